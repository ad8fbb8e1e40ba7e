;; Has a start section that never returns: it runs while the module is instantiated, before `_start`.
(module
  (memory (export "memory") 1)
  (func $forever (loop br 0))
  (start $forever)
  (func (export "_start"))
)
