;; Has a data segment that lies outside its memory: it fails when the module is instantiated.
(module
  (memory (export "memory") 1)
  (data (i32.const 65535) "two bytes")
  (func (export "_start"))
)
