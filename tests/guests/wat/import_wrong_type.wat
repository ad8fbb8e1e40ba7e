;; Imports a function of the host under a signature that it does not have.
(module
  (import "turnhouse_v1" "abi_revision" (func (param i64) (result i64)))
  (memory (export "memory") 1)
  (func (export "_start"))
)
