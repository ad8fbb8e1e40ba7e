//! What only a host on the embedded store does: its data directory is the one place of what it keeps.

mod files;
