;; What a new org's default agent runs until somebody deploys something better: standard input to standard output.
;; At 0 one iovec, at 8 how much was read, at 12 how much was written, at 64 the buffer.
(module
  (import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (loop
      (i32.store (i32.const 0) (i32.const 64))
      (i32.store (i32.const 4) (i32.const 4096))
      (if (call 0 (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)) (then unreachable))
      (if (i32.load (i32.const 8))
        (then
          (i32.store (i32.const 4) (i32.load (i32.const 8)))
          (if (call 1 (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 12)) (then unreachable))
          (br 1))))))
