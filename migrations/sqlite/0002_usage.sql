-- What a turn used, beyond CPU time and memory. NULL in turns that ended before these were measured.
ALTER TABLE turns ADD COLUMN bytes_in INTEGER;
ALTER TABLE turns ADD COLUMN bytes_out INTEGER;
-- How long its instance existed, milliseconds.
ALTER TABLE turns ADD COLUMN instance_ms REAL;
