// What scrolls sideways can be reached by keyboard.
const watch = new ResizeObserver(entries => entries.forEach(({target}) => {
  if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
  else target.removeAttribute("tabindex");
}));
document.querySelectorAll(".bd-main :is(pre, .permask-frame, .permask-scroll, .pst-scrollable-table-container, mjx-container[display])")
  .forEach(one => watch.observe(one));

// On a narrow screen the panels of a figure are stacked. The SVG says where they lie and how large its smallest letters are,
// in points; letters have at least 9 pixels.
const narrow = matchMedia("(max-width: 600px)");
document.querySelectorAll(".permask-frame > img").forEach(image => {
  const frame = image.parentNode;
  const stack = () => {
    frame.querySelectorAll(".permask-panel").forEach(panel => panel.remove());
    const read = name => (image.src.match(`${name}='([^']*)'`) || ["", ""])[1].split(" ").map(Number);
    const cuts = read("data-cuts"), widths = cuts.slice(1).map((right, i) => right - cuts[i]);
    const [letters] = read("data-letters"), wide = 9 * cuts.at(-1) / letters > frame.clientWidth;
    image.hidden = narrow.matches && wide && 1 < widths.length && widths.length < 5 && !image.matches(".permask-drag");
    if (!image.hidden) return;
    widths.forEach((width, i) => {
      const panel = new Image();
      panel.className = "permask-panel";
      panel.alt = i ? "" : image.alt;
      panel.style.width = `${100 * width / Math.max(...widths)}%`;
      panel.style.minWidth = `${9 * width / letters}px`;
      panel.src = image.src.replace(/width='[^']*'/, `width='${width}pt'`)
        .replace(/viewBox='\S+ \S+ \S+ /, `viewBox='${cuts[i]} 0 ${width} `);
      frame.append(panel);
    });
  };
  new MutationObserver(stack).observe(image, {attributeFilter: ["src", "class"]});
  narrow.addEventListener("change", stack);
  stack();
});
