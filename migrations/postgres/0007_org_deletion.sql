-- Every host asks once a second which orgs are being deleted: next to none.
CREATE INDEX orgs_deleting ON orgs (org_id) WHERE deleting_at IS NOT NULL;
