;; Exports `_initialize` as well: a reactor, which would have to be called before `_start`.
(module
  (memory (export "memory") 1)
  (func (export "_initialize"))
  (func (export "_start"))
)
