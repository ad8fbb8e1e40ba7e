;; Traps in `_start` itself, at its first instruction.
(module
  (memory (export "memory") 1)
  (func (export "_start") unreachable)
)
