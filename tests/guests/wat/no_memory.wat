;; Exports no memory, so that no host call could read or write anything.
(module
  (memory 1)
  (func (export "_start"))
)
