;; Exports a `memory` that is a function.
(module
  (memory 1)
  (func (export "memory"))
  (func (export "_start"))
)
