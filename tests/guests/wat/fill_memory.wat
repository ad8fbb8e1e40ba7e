;; Fills all of its 32 MiB in one instruction, again and again: between two instructions no clock is looked at.
(module
  (memory (export "memory") 512)
  (func (export "_start")
    (loop $again
      (memory.fill (i32.const 0) (i32.const 165) (i32.const 33554432))
      (br $again)))
)
