;; Has all the memory that it may, and copies one half of it over the other in one instruction, again and again.
(module
  (memory (export "memory") 1024)
  (func (export "_start")
    (loop $again
      (memory.copy (i32.const 0) (i32.const 33554432) (i32.const 33554432))
      (br $again)))
)
