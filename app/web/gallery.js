// Pictures that this browser keeps, newest first, in IndexedDB.

const MOST = 60;

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("sdxl-lightning", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("pictures", mode);
      const request = work(transaction.objectStore("pictures"));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onerror = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const all = async () => (await run("readonly", (store) => store.getAll())).reverse();

/** Keeps { blob, body, facts }, without those that are one too many. Returns its id. */
export async function keep(picture) {
  const id = await run("readwrite", (store) => store.add(picture));
  const keys = await run("readonly", (store) => store.getAllKeys());
  const old = keys.slice(0, Math.max(0, keys.length - MOST));
  if (old.length) await run("readwrite", (store) => store.delete(IDBKeyRange.upperBound(old.at(-1))));
  return id;
}

export const forgetAll = () => run("readwrite", (store) => store.clear());
