;; The smallest command there is: does nothing, says nothing, ends well.
(module
  (memory (export "memory") 1)
  (func (export "_start"))
)
