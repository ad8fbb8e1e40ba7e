-- Under these stream tickets are authenticated, by the newest that has been there for a minute. The hosts', not an org's: a ticket names its org
-- within what is authenticated. The one before the newest still holds for what was made under it; older ones go.
CREATE TABLE ticket_keys (
  key_no     bigint NOT NULL PRIMARY KEY CHECK (key_no > 0),
  secret     bytea  NOT NULL CHECK (length(secret) = 32),
  created_at bigint NOT NULL
);

-- The key that was made to take this one's place; this one ends soon after.
ALTER TABLE api_keys ADD COLUMN successor text COLLATE "C";
