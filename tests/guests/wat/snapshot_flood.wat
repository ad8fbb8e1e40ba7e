;; Saves a state that is over the limit, for ever: each time the host has something to tell.
(module
  (import "turnhouse_v1" "snapshot_write" (func $write (param i32 i32) (result i32)))
  (memory (export "memory") 128)
  (func (export "_start")
    (loop $again
      (br_if $again (i32.eq (call $write (i32.const 0) (i32.const 8000000)) (i32.const -1)))))
)
