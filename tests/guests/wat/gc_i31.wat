;; Uses a small integer of the garbage collection proposal, which needs no type of its own.
(module
  (memory (export "memory") 1)
  (func (export "_start") (drop (ref.i31 (i32.const 1))))
)
