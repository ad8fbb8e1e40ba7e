;; Uses an instruction of the threads proposal, on a memory that is its own.
(module
  (memory (export "memory") 1)
  (func (export "_start") (drop (i32.atomic.rmw.add (i32.const 0) (i32.const 1))))
)
