;; Exports no `_start`: a library, no command.
(module
  (memory (export "memory") 1)
  (func (export "run"))
)
