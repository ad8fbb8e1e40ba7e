;; Makes a structure of the garbage collection proposal.
(module
  (type $pair (struct (field i32) (field i32)))
  (memory (export "memory") 1)
  (func (export "_start") (drop (struct.new_default $pair)))
)
