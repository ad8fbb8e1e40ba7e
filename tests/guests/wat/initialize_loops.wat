;; Exports an `_initialize` that never returns, for a host that would call it before `_start`.
(module
  (memory (export "memory") 1)
  (func (export "_initialize") (loop br 0))
  (func (export "_start"))
)
