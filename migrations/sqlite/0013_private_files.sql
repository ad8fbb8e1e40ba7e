-- What a conversation's private directory takes of the disk, as counted when its last turn had left it. Its generation's: none when that is renewed.
ALTER TABLE conversations ADD COLUMN files_bytes INTEGER NOT NULL DEFAULT 0 CHECK (files_bytes >= 0);
