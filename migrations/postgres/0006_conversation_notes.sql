-- What people write on a conversation. Beside its row, which every turn writes anew: nothing of this is copied then.
CREATE TABLE conversation_notes (
  org_id          text COLLATE "C" NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  conversation_id text COLLATE "C" NOT NULL,
  title           text CHECK (length(title) BETWEEN 1 AND 200),
  metadata        text CHECK (length(metadata) <= 65536),          -- JSON object of strings
  PRIMARY KEY (org_id, agent_id, conversation_id)
);

-- Writes on a conversation that is there and is p_whose (null: whosever it is); false: it is not. What is not to be set stays. Under the lock under which it would be deleted, or a title
-- could outlive its conversation and stand over the next of its name.
CREATE FUNCTION write_notes(p_org text, p_agent text, p_conversation text, p_whose text, p_set_title boolean, p_title text, p_set_metadata boolean, p_metadata text)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM 1 FROM org_load WHERE org_id = p_org FOR NO KEY UPDATE;
  PERFORM 1 FROM conversations
    WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND deleted_at IS NULL AND (p_whose IS NULL OR user_id = p_whose);
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  INSERT INTO conversation_notes AS n (org_id, agent_id, conversation_id, title, metadata)
  VALUES (p_org, p_agent, p_conversation, p_title, p_metadata)
  ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE
     SET title = CASE WHEN p_set_title THEN excluded.title ELSE n.title END,
         metadata = CASE WHEN p_set_metadata THEN excluded.metadata ELSE n.metadata END;
  RETURN true;
END $$;

-- Deletes a conversation with what is written on it. A statement of its own, after the lock that the deletion takes: it sees what was written before that.
CREATE FUNCTION delete_conversation_and_notes(p_now bigint, p_org text, p_agent text, p_conversation text, p_whose text, p_generation uuid)
RETURNS TABLE (turn uuid, was text, accepted bigint, ended bigint) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT d.turn, d.was, d.accepted, d.ended FROM delete_conversation(p_now, p_org, p_agent, p_conversation, p_whose, p_generation) d;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  DELETE FROM conversation_notes n WHERE n.org_id = p_org AND n.agent_id = p_agent AND n.conversation_id = p_conversation;
END $$;
