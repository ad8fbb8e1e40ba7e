;; Traps in `_start` by calling a function through the table under another type.
(module
  (memory (export "memory") 1)
  (table 1 funcref)
  (elem (i32.const 0) $takes_one)
  (type $takes_none (func))
  (func $takes_one (param i32))
  (func (export "_start") (call_indirect (type $takes_none) (i32.const 0)))
)
