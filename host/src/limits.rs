//! Every bound of the host, named, with its default and its unit. One table: configuration, documentation and `--help` read it from here.

use serde::{Deserialize, Serialize};

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $default:expr;)*) => {
        /// The host's bounds. Each can be set in the configuration file under `[limits]` or as `TURNHOUSE_LIMITS__<NAME>`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Limits {
            $($(#[$doc])* pub $name: $kind,)*
        }

        impl Default for Limits {
            fn default() -> Self {
                Limits { $($name: $default,)* }
            }
        }
    };
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

limits! {
    // The edge.
    /// A request's path and query.
    url_bytes_max: usize = 8 * KIB;
    /// Connections from one address (an IPv6 address' /64), this machine's own aside: a proxy's are everybody's. 0: any number.
    connections_per_address_max: usize = 1_024;
    /// A request's body, workers aside.
    request_body_bytes_max: usize = 2 * MIB;
    /// The texts and JSON of one message.
    message_text_bytes_max: usize = 256 * KIB;
    /// Parts of one message.
    message_parts_max: usize = 32;
    /// One blob of a message, decoded.
    message_blob_bytes_max: usize = MIB;
    /// One attachment.
    attachment_bytes_max: usize = 16 * MIB;
    /// All attachments of one message.
    message_attachments_bytes_max: u64 = 64 * MIB as u64;
    /// All attachments of one org.
    org_attachments_bytes_max: u64 = 10 << 30;
    /// How long an attachment is kept for whoever uploaded it, without a message that refers to it.
    attachment_upload_ms: u64 = 86_400_000;
    /// An `Idempotency-Key`.
    idempotency_key_bytes_max: usize = 255;
    /// How long an `Idempotency-Key` is remembered.
    idempotency_retention_ms: u64 = 86_400_000;
    /// After so many days the log of an ended turn goes (deltas, statuses, logs); its message, reply and end stay. 0: never.
    event_retention_days: u32 = 7;
    /// After so many days an ended turn goes. Its conversation and the newest snapshots stay. 0: never.
    turn_retention_days: u32 = 0;
    /// After so many days an entry of the audit goes; at least 30. 0: never.
    audit_retention_days: u32 = 365;
    /// After an org is marked for deletion, so long until its rows go: requests that were let in before are over then.
    org_deletion_grace_ms: u64 = 15_000;
    /// The longest `Prefer: wait`.
    wait_ms_max: u64 = 60_000;
    /// Items of one page of a list.
    page_items_max: usize = 100;
    /// Failed authentications of one address before it is told to wait.
    auth_failures_per_minute: u32 = 30;
    /// So many days before its end an API key is said to expire soon: in `keys list`, in answers' headers, in the log.
    key_warning_days: u32 = 14;
    /// How long a stream ticket outlives its turn.
    ticket_grace_ms: u64 = 600_000;
    /// How long a stream ticket lives at most, however long its turn does.
    ticket_ms_max: u64 = 86_400_000;

    // Modules.
    /// An uploaded module.
    module_bytes_max: usize = 32 * MIB;
    /// Functions of a module.
    module_functions_max: usize = 50_000;
    /// Wall time of one compilation.
    compile_timeout_ms: u64 = 60_000;
    /// Address space of the process that compiles a module.
    compile_memory_bytes_max: usize = 2 << 30;
    /// What a module may compile to.
    compile_output_bytes_max: usize = 256 * MIB;
    /// Compilations at once.
    compiles_concurrent_max: usize = 2;
    /// Compiled modules on disk.
    cache_bytes_max: u64 = 4 << 30;
    /// Versions of one worker.
    worker_versions_kept: usize = 100;
    /// Workers of one org.
    org_workers_max: usize = 1_000;
    /// Agents of one org.
    org_agents_max: usize = 1_000;
    /// Members of one org.
    org_members_max: usize = 10_000;

    // Queues.
    /// Turns of one conversation that wait behind its running one.
    conversation_queue_max: usize = 20;
    /// Live turns of one org.
    org_queue_max: usize = 20_000;
    /// Messages a second of one org, over time. 0: any number.
    org_submits_per_second: f64 = 0.0;
    /// Messages of one org at once, after a pause, where its rate is limited. 0: as many as come in a second, one at least.
    org_submit_burst: u32 = 0;
    /// Milliseconds of guests' processor time of one org an hour. 0: any number.
    org_cpu_ms_per_hour: u64 = 0;
    /// Bytes of one org's turns, events, snapshots, attachments and modules, as last measured. 0: any number.
    org_storage_bytes_max: u64 = 50 << 30;
    /// Live turns of the host.
    host_queue_max: usize = 100_000;
    /// Running turns of one org.
    org_running_max: usize = 250;
    /// Running turns of the host: the size of the instance pool.
    host_running_max: usize = 1_000;
    /// How often a turn may be started, counting losses of its host.
    attempts_max: u32 = 3;
    /// How often the gate may refuse an envelope.
    gate_refusals_max: u32 = 5;
    /// The first delay of a turn that goes back to the queue.
    backoff_ms: u64 = 250;
    /// The longest.
    backoff_ms_max: u64 = 30_000;

    // Clocks.
    /// Ready, and not started.
    admission_timeout_ms: u64 = 120_000;
    /// Waiting behind other turns of its conversation.
    queue_timeout_ms: u64 = 3_600_000;
    /// Wall time of a turn, where its agent says nothing.
    turn_timeout_ms: u64 = 60_000;
    /// The longest that an agent may set.
    turn_timeout_ms_max: u64 = 900_000;
    /// Time without progress.
    idle_timeout_ms: u64 = 30_000;
    /// Guest CPU time.
    cpu_timeout_ms: u64 = 10_000;
    /// One host operation.
    operation_timeout_ms: u64 = 60_000;
    /// From SIGTERM to exit.
    drain_timeout_ms: u64 = 25_000;
    /// A cancelled guest is gone within this.
    cancel_poll_ms: u64 = 1_000;
    /// How long a replica lives without renewing.
    lease_ttl_ms: u64 = 15_000;
    /// How often it renews.
    lease_renew_ms: u64 = 3_000;
    /// How long before its expiry a replica that cannot renew stops its turns.
    lease_margin_ms: u64 = 3_000;

    // The guest.
    /// Linear memory.
    memory_bytes_max: usize = 64 * MIB;
    /// Elements of its tables.
    table_elements_max: usize = 65_536;
    /// Its wasm stack.
    wasm_stack_bytes_max: usize = 512 * KIB;
    /// The native stack that it runs on, host calls included.
    async_stack_bytes: usize = 2 * MIB;
    /// Its input as JSON.
    input_bytes_max: usize = 4 * MIB;
    /// Completed turns that its input may carry.
    history_messages_max: usize = 50;
    /// Its reply, and its standard output.
    reply_bytes_max: usize = MIB;
    /// Its log, standard error included; the rest is dropped and counted.
    log_bytes_max: usize = 256 * KIB;
    /// One emitted event.
    emit_bytes_max: usize = 64 * KIB;
    /// Emitted events of one turn.
    emit_events_max: u64 = 10_000;
    /// Host calls of one turn.
    host_calls_max: u64 = 1_000_000;
    /// Random bytes of one call.
    random_bytes_max: u64 = MIB as u64;
    /// Open file descriptors.
    fds_max: usize = 64;
    /// What a turn may have read of its attachments, as often as it reads them.
    attachment_read_bytes_max: u64 = 256 * MIB as u64;
    /// Its environment.
    env_bytes_max: usize = 32 * KIB;
    /// A private directory (session mode `file`): the sizes of its files and the targets of its symbolic links.
    private_dir_bytes_max: u64 = 64 * MIB as u64;
    /// Its files, directories and links; and so how deep they can be nested.
    private_dir_files_max: u64 = 1_000;

    // Operations.
    /// Operations of one turn.
    operations_max: u64 = 128;
    /// Operations of one turn at once.
    operations_concurrent_max: usize = 8;
    /// One request.
    operation_request_bytes_max: usize = MIB;
    /// All frames of one operation.
    operation_response_bytes_max: usize = 8 * MIB;
    /// One frame.
    operation_frame_bytes_max: usize = 64 * KIB;

    // State.
    /// One snapshot.
    snapshot_bytes_max: usize = 4 * MIB;
    /// Snapshots of a conversation that keep their bytes.
    snapshots_kept: u32 = 10;

    // Streams.
    /// How long deltas are gathered before they are written.
    delta_batch_ms: u64 = 25;
    /// How many bytes of them.
    delta_batch_bytes: usize = 16 * KIB;
    /// A quiet stream's comment.
    ping_ms: u64 = 15_000;
    /// Readers of one turn.
    readers_per_turn_max: usize = 32;
    /// Readers of one org.
    readers_per_org_max: usize = 1_000;
    /// Readers of the host.
    readers_host_max: usize = 10_000;
    /// What is kept in memory of a live turn's events for its readers; older ones are read from the store.
    reader_buffer_bytes_max: usize = 256 * KIB;
}

impl Limits {
    /// `key_warning_days`, in milliseconds.
    pub fn key_warning_ms(&self) -> u64 {
        u64::from(self.key_warning_days) * 86_400_000
    }

    /// Names the first setting that contradicts another, with what to change.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("url_bytes_max", self.url_bytes_max / 256),
            ("host_running_max", self.host_running_max),
            ("org_running_max", self.org_running_max),
            ("conversation_queue_max", self.conversation_queue_max),
            ("page_items_max", self.page_items_max),
            ("memory_bytes_max", self.memory_bytes_max / (64 * KIB)),
            ("compile_memory_bytes_max", self.compile_memory_bytes_max / (256 * MIB)),
            ("compiles_concurrent_max", self.compiles_concurrent_max),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("limits.{name} is too small to run anything; raise it"));
        }
        if self.attempts_max == 0 || self.gate_refusals_max == 0 {
            return Err("limits.attempts_max and limits.gate_refusals_max must be at least 1".to_owned());
        }
        if self.async_stack_bytes < self.wasm_stack_bytes_max + MIB {
            return Err(
                "limits.async_stack_bytes must be at least 1 MiB more than limits.wasm_stack_bytes_max: host calls run on what is left"
                    .to_owned(),
            );
        }
        if (1..30).contains(&self.audit_retention_days) {
            return Err("limits.audit_retention_days must be at least 30, or 0 to keep the audit for ever".to_owned());
        }
        if !self.org_submits_per_second.is_finite() || self.org_submits_per_second < 0.0 {
            return Err("limits.org_submits_per_second must be a number of messages, or 0 for any number".to_owned());
        }
        if self.turn_timeout_ms > self.turn_timeout_ms_max {
            return Err("limits.turn_timeout_ms is over limits.turn_timeout_ms_max".to_owned());
        }
        if self.lease_ttl_ms < self.lease_renew_ms + self.lease_margin_ms {
            return Err("limits.lease_ttl_ms must be at least lease_renew_ms + lease_margin_ms".to_owned());
        }
        if self.ticket_ms_max > 30 * 86_400_000 {
            return Err(
                "limits.ticket_ms_max must be at most 30 days: the keys of tickets are replaced after that".to_owned()
            );
        }
        if self.conversation_queue_max > self.org_queue_max || self.org_queue_max > self.host_queue_max {
            return Err("limits: conversation_queue_max ≤ org_queue_max ≤ host_queue_max must hold".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_agree_with_each_other() {
        Limits::default().check().unwrap();
    }

    #[test]
    fn a_contradiction_is_named() {
        let limits = Limits { async_stack_bytes: 600 * KIB, ..Limits::default() };
        assert!(limits.check().unwrap_err().contains("async_stack_bytes"));
        let limits = Limits { audit_retention_days: 29, ..Limits::default() };
        assert!(limits.check().unwrap_err().contains("audit_retention_days"));
    }
}
