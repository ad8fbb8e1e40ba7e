;; A component: the other kind of wasm binary, which is no module.
(component)
