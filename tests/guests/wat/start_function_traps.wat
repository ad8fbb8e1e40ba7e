;; Has a start section that traps while the module is instantiated.
(module
  (memory (export "memory") 1)
  (func $trap unreachable)
  (start $trap)
  (func (export "_start"))
)
