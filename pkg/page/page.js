
"use strict";
// The page is fetched again and what differs takes its place, so that nothing
// flickers and nobody loses the line that they read.
const every = 5000;
const lost = document.getElementById("lost");
let since = null;
async function renew() {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.href, {cache: "no-store"});
    if (!answer.ok) throw new Error("it answers " + answer.status);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(part.id);
      if (now && now.outerHTML !== part.outerHTML) part.replaceWith(document.adoptNode(now));
    }
    document.title = fresh.title;
    since = null;
    lost.hidden = true;
  } catch (err) {
    since = since || new Date();
    lost.textContent = "wgcnid has not answered since " + since.toLocaleTimeString() + ": what is below is older. Traffic does not depend on it.";
    lost.hidden = false;
  }
}
setInterval(renew, every);
document.addEventListener("visibilitychange", renew);
