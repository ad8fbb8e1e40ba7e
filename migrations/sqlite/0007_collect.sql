-- Parts of its message, where further messages may join it while it waits.
ALTER TABLE turn_markers ADD COLUMN collected INTEGER NOT NULL DEFAULT 0;
