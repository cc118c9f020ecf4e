// Set formulas as SVG with the MathJax in the folder given: [[tex, display], ...] on stdin, [css, [html, ...]] on stdout.
// With the SVG comes MathML for screen readers.
global.MathJax = {
  loader: {paths: {mathjax: process.argv[2]}, require, load: ["adaptors/liteDOM", "input/tex", "output/svg", "a11y/assistive-mml"]},
  startup: {typeset: false},
  svg: {fontCache: "none"},
};
require(process.argv[2] + "/startup.js");
MathJax.startup.promise.then(() => {
  const adaptor = MathJax.startup.adaptor;
  const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const set = formulas.map(([tex, display]) => adaptor.outerHTML(MathJax.tex2svg(tex, {display})));
  process.stdout.write(JSON.stringify([adaptor.textContent(MathJax.svgStylesheet()), set]));
});
