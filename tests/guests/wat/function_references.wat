;; Calls a function through a typed reference.
(module
  (type $none (func))
  (memory (export "memory") 1)
  (func $f)
  (elem declare func $f)
  (func (export "_start") (call_ref $none (ref.func $f)))
)
