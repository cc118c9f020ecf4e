// What scrolls sideways can be reached by keyboard.
const watch = new ResizeObserver(entries => entries.forEach(({target}) => {
  if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
  else target.removeAttribute("tabindex");
}));
document.querySelectorAll(".bd-main :is(pre, .permask-frame, .permask-scroll, .pst-scrollable-table-container, mjx-container[display])")
  .forEach(one => watch.observe(one));
