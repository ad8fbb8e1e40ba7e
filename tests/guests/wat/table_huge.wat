;; Wants a table of ten million elements from the start.
(module
  (memory (export "memory") 1)
  (table 10000000 funcref)
  (func (export "_start"))
)
