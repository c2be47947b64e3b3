// Service worker: keeps the page's own files, so that conversations can be read while the server is down.

const CACHE = "gptjax-page";
const FILES = ["../", "style.css", "icon.svg", "main.js", "replies.js", "store.js", "server.js", "view.js", "tokens.js"];

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { pathname } = new URL(event.request.url);
  const root = new URL(self.registration.scope).pathname;
  if (event.request.method !== "GET" || !(pathname === root || pathname.startsWith(`${root}assets/`))) return;
  event.respondWith(
    (async () => {
      const cache = await caches.open(CACHE);
      try {
        const reply = await fetch(event.request);
        if (reply.ok) await cache.put(event.request, reply.clone());
        return reply;
      } catch (error) {
        const kept = await cache.match(event.request, { ignoreSearch: true });
        if (kept) return kept;
        throw error;
      }
    })(),
  );
});
