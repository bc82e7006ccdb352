// Keeps a number and its unit on one line: 92.81 ± 0.24 %, 1.5 ms.
document.addEventListener("DOMContentLoaded", () => {
  const page = document.querySelector(".md-content") || document.body;
  const texts = document.createTreeWalker(page, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (!text.parentElement.closest("pre, code")) {
      text.nodeValue = text.nodeValue
        .replace(/(\d)\s(%|ms\b|x\b)/g, "$1\u00a0$2")
        .replace(/(\d)\s±\s(\d)/g, "$1\u00a0±\u00a0$2");
    }
  }
});
