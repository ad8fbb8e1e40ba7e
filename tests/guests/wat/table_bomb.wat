;; Grows its table by 1 000 elements at a time until it is refused, then traps if it got a million or more; otherwise it ends without a reply.
(module
  (memory (export "memory") 1)
  (table $t 1 funcref)
  (func (export "_start")
    (loop $more
      (br_if $more (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))))
    (if (i32.ge_u (table.size $t) (i32.const 1000000)) (then unreachable)))
)
