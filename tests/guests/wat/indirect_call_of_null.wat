;; Traps in `_start` by calling an element of its table that is null.
(module
  (memory (export "memory") 1)
  (table 8 funcref)
  (type $none (func))
  (func (export "_start") (call_indirect (type $none) (i32.const 7)))
)
