;; Wants 1 GiB of memory from the start.
(module
  (memory (export "memory") 16384)
  (func (export "_start"))
)
