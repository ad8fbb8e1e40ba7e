-- When an org was given its default agent. Asked for again, it is not given another: that it has none may be its admin's wish.
ALTER TABLE orgs ADD COLUMN provisioned_at bigint;
