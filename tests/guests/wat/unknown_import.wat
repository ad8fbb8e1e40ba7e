;; Imports a function that no host has, from a module that it has.
(module
  (import "turnhouse_v1" "launch_missiles" (func (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start"))
)
