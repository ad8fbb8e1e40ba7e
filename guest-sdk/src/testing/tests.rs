//! The SDK against the fake host: what an author's calls do, and what the report says.

use serde_json::json;

use super::*;
use crate::{Error, Operation, Saved, wait_any};

#[test]
fn what_is_said_streams_and_is_the_reply() {
    let report = turn("hi").run(|turn: Turn| {
        turn.status("thinking")?;
        turn.say("hel")?;
        turn.say("")?;
        turn.say("lo")?;
        Ok(())
    });
    assert_eq!(report.deltas, ["hel", "lo"]);
    assert_eq!(report.statuses, ["thinking"]);
    assert_eq!(report.text(), "hello");
}

#[test]
fn a_reply_replaces_what_was_said_and_the_last_one_wins() {
    let report = turn("hi").run(|turn: Turn| {
        turn.say("draft")?;
        turn.reply("first")?;
        let malformed = Part::Blob { media_type: "image/png".into(), base64: "not base64".into() };
        assert!(matches!(turn.reply_parts([malformed]), Err(Error::Invalid)));
        assert!(matches!(turn.reply_parts([Part::Unknown]), Err(Error::Json(_))));
        turn.reply_parts([Part::text("second"), Part::json(&[1, 2])?, Part::blob("image/png", &[0, 255])])?;
        Ok(())
    });
    assert_eq!(report.text(), "second");
    assert_eq!(report.reply().unwrap().parts[2].bytes(), Some(vec![0, 255]));
}

#[test]
fn an_attachment_is_read_from_anywhere_and_no_other_is_there() {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let report = turn("count").attachment("a.txt", "text/plain", "one two").run(|turn: Turn| {
        let Part::Attachment { attachment_id, name, bytes, .. } = &turn.input()?.message.parts[1] else {
            panic!("it is the second part")
        };
        assert_eq!((name.as_deref(), *bytes), (Some("a.txt"), 7));
        let mut file = turn.attachment(attachment_id)?;
        assert_eq!((file.size(), file.read_all()?), (7, b"one two".to_vec()));
        assert_eq!(file.read(&mut [0; 4])?, 0, "it is at its end");
        let mut rest = String::new();
        file.seek(SeekFrom::End(-3))?;
        file.read_to_string(&mut rest)?;
        assert_eq!(rest, "two");
        file.seek(SeekFrom::Start(u64::MAX))?;
        assert_eq!((file.read(&mut [0; 4])?, file.seek(SeekFrom::Current(-1)).is_ok()), (0, true));
        assert!(file.seek(SeekFrom::End(-8)).is_err());
        assert!(matches!(turn.attachment(&attachment_id.replace('1', "2")), Err(Error::NotFound)));
        assert!(matches!(turn.attachment("a.txt"), Err(Error::Invalid)));
        assert!(turn.reply_parts(turn.input()?.message.parts.clone()).is_err(), "a reply has none");
        Ok(turn.say("read")?)
    });
    assert_eq!(report.text(), "read");
}

#[test]
fn a_long_text_is_said_in_pieces_that_keep_characters_whole() {
    let text = "ä".repeat(40_000);
    let expected = text.clone();
    let report = turn("hi").run(move |turn: Turn| Ok(turn.say(&text)?));
    assert_eq!(report.text(), expected);
    assert_eq!(report.deltas.iter().map(String::len).collect::<Vec<_>>(), [32_768, 32_768, 14_464]);
}

#[test]
fn an_error_fails_the_turn_with_its_causes_and_saves_nothing() {
    let report = turn("hi").state_bytes(*b"[1").run(|turn: Turn| {
        turn.say("so far")?;
        turn.save("lost")?;
        turn.state::<Vec<u32>>()?;
        Ok(())
    });
    let error = report.error.as_deref().unwrap();
    assert!(error.starts_with("not the JSON that was expected: EOF"), "{error}");
    assert_eq!(report.logs, [(Level::Error, error.to_owned())]);
    assert_eq!(report.reply(), None);
    assert_eq!(report.state::<String>(), None);
}

#[test]
fn silence_is_no_reply() {
    assert_eq!(turn("hi").run(|_| Ok(())).reply(), None);
    assert_eq!(turn("hi").run(|turn: Turn| Ok(turn.reply("")?)).reply(), None);
}

#[test]
fn a_private_turn_reads_and_saves_no_state_without_an_error() {
    let report = turn("hi").state(&7).history("before", "after").private().run(|turn: Turn| {
        assert_eq!(turn.state::<u32>()?, None);
        assert_eq!(turn.save(&8)?, Saved::Private);
        assert!(turn.input()?.history.is_empty());
        Ok(turn.say("fine")?)
    });
    assert_eq!(report.text(), "fine");
    assert_eq!(report.saved, None);
}

#[test]
fn a_state_that_is_too_big_leaves_what_was_saved_before() {
    let report = turn("hi").state_bytes_max(8).run(|turn: Turn| {
        assert_eq!(turn.save("small")?, Saved::Staged);
        assert!(matches!(turn.save("much too long"), Err(Error::TooBig)));
        Ok(turn.say("fine")?)
    });
    assert_eq!(report.state::<String>().as_deref(), Some("small"));
    assert_eq!(report.rejected_states, [15]);
}

#[test]
fn the_input_tells_ids_attempt_environment_and_history() {
    let report = turn(vec![Part::text("look"), Part::blob("text/plain", b"file")])
        .attempt(2)
        .dry_run()
        .environment("TONE", "dry")
        .history("what?", "that.")
        .state(&1)
        .run(|turn: Turn| {
            assert_eq!(turn.text(), "look");
            let input = turn.input()?;
            assert_eq!((input.turn_id.as_str(), input.attempt, input.dry_run), ("turn", 2, true));
            assert_eq!(input.environment["TONE"], "dry");
            assert_eq!(input.message.parts[1].bytes().as_deref(), Some(&b"file"[..]));
            assert_eq!((input.history[0].role, input.history[0].message.text()), (Role::User, "what?".into()));
            assert_eq!((input.history[1].role, input.history[1].message.text()), (Role::Agent, "that.".into()));
            assert_eq!(input.snapshot.as_ref().unwrap().version, 1);
            assert!(input.deadline_unix_ms.is_some());
            Ok(turn.say("fine")?)
        });
    report.text();
}

#[test]
fn the_time_left_is_until_the_deadline_and_never_negative() {
    let left = |turn: TestTurn| {
        let told = std::rc::Rc::new(std::cell::Cell::new(None));
        let tell = told.clone();
        let report = turn.run(move |turn: Turn| {
            tell.set(turn.input()?.time_left());
            Ok(())
        });
        assert_eq!(report.error, None);
        told.get().unwrap()
    };
    let far = left(turn("hi").time_left(Duration::from_secs(900)));
    assert!(far <= Duration::from_secs(900) && far > Duration::from_secs(600), "{far:?}");
    assert_eq!(left(turn("hi").time_left(Duration::ZERO)), Duration::ZERO);
}

#[test]
fn events_of_ones_own_need_a_name_of_the_right_form() {
    let report = turn("hi").run(|turn: Turn| {
        turn.emit("x.progress-1", &json!({ "done": 3 }))?;
        for name in ["x.", "y.a", "x.Ä", "x.UP", "status", "output.delta", "turn.completed"] {
            assert!(matches!(turn.emit(name, &1), Err(Error::Invalid)), "{name}");
        }
        assert!(matches!(turn.emit(&format!("x.{}", "a".repeat(49)), &1), Err(Error::Invalid)));
        assert!(matches!(turn.emit("x.big", &"a".repeat(65_536)), Err(Error::TooBig)));
        Ok(turn.say("fine")?)
    });
    assert_eq!(report.events, [("x.progress-1".to_owned(), json!({ "done": 3 }))]);
}

#[test]
fn events_run_out() {
    let report = turn("hi").run(|turn: Turn| {
        for _ in 0..10_000 {
            turn.say("a")?;
        }
        assert!(matches!(turn.say("b"), Err(Error::Exhausted)));
        Ok(())
    });
    assert_eq!(report.text().len(), 10_000);
}

#[test]
fn what_is_said_in_all_has_the_bound_of_a_reply() {
    let report = turn("hi").run(|turn: Turn| {
        turn.say(&"a".repeat(1024 * 1024))?;
        assert!(matches!(turn.say("b"), Err(Error::TooBig)));
        Ok(())
    });
    assert_eq!(report.text().len(), 1024 * 1024);
}

fn echo(turn: &Turn) -> Result<Operation, Error> {
    turn.call("host.echo", &json!({ "frames": ["a"] }))
}

#[test]
fn frames_longer_than_usual_arrive_whole() {
    let report =
        turn("hi").on_call("host.echo", |_| Answer::head(&json!({})).frame([7; 10_000]).frame("")).run(|turn: Turn| {
            let mut operation = echo(&turn)?;
            assert_eq!(operation.recv_json::<Value>()?, Some(json!({})));
            assert_eq!(operation.recv()?, Some(vec![7; 10_000]));
            assert_eq!(operation.recv()?, None);
            assert_eq!(operation.recv()?, None);
            Ok(turn.say("fine")?)
        });
    report.text();
    assert_eq!(report.calls, [("host.echo".to_owned(), json!({ "frames": ["a"] }))]);
}

#[test]
fn an_operation_that_fails_says_why_after_its_frames() {
    let failure = OperationError::new("provider_unavailable", "try later").retry_after_ms(250);
    let scripted = failure.clone();
    let report = turn("hi").on_call("host.echo", move |_| Answer::head(&1).then_failed(scripted.clone())).run(
        move |turn: Turn| {
            let mut operation = echo(&turn)?;
            assert_eq!(operation.recv_json()?, Some(1));
            for _ in 0..2 {
                assert!(matches!(operation.recv(), Err(Error::Operation(told)) if told == failure));
            }
            operation.recv()?;
            Ok(())
        },
    );
    assert_eq!(report.error.as_deref(), Some("the operation failed: try later (provider_unavailable)"));
}

#[test]
fn waiting_times_out_polls_and_finds_the_first_that_is_ready() {
    let report = turn("hi")
        .on_call("slow", |_| Answer::head(&0).then_pending())
        .on_call("never", |_| Answer::pending())
        .run(|turn: Turn| {
            let (mut slow, mut never) = (turn.call("slow", &())?, turn.call("never", &())?);
            assert_eq!(wait_any([&never, &slow], None)?, 1);
            assert!(slow.recv()?.is_some());
            assert!(matches!(slow.recv_timeout(Duration::from_micros(1)), Err(Error::TimedOut)));
            assert!(matches!(never.try_recv(), Err(Error::NotReady)));
            assert!(matches!(wait_any([&never, &slow], Some(Duration::from_secs(1))), Err(Error::TimedOut)));
            assert!(matches!(wait_any([&never, &slow], Some(Duration::ZERO)), Err(Error::NotReady)));
            assert!(matches!(wait_any([], None), Err(Error::Invalid)));
            assert!(matches!(wait_any([&slow; 9], None), Err(Error::Invalid)));
            Ok(turn.say("fine")?)
        });
    report.text();
}

#[test]
fn operations_are_refused_and_bounded_and_dropping_one_makes_room() {
    let report = turn("hi")
        .on_call("host.echo", |_| Answer::pending())
        .on_call("denied", |_| Answer::denied())
        .on_call("picky", |_| Answer::invalid())
        .run(|turn: Turn| {
            assert!(matches!(turn.call("unheard.of", &()), Err(Error::UnknownOperation)));
            assert!(matches!(turn.call("denied", &()), Err(Error::Denied)));
            assert!(matches!(turn.call("picky", &()), Err(Error::Invalid)));
            let mut open: Vec<Operation> = (0..8).map(|_| echo(&turn)).collect::<Result<_, _>>()?;
            assert!(matches!(echo(&turn), Err(Error::TooManyOpen)));
            open.pop();
            open.push(echo(&turn)?);
            drop(open);
            for _ in 9..128 {
                echo(&turn)?;
            }
            assert!(matches!(echo(&turn), Err(Error::Exhausted)));
            Ok(turn.say("fine")?)
        });
    report.text();
}

#[test]
#[should_panic(expected = "waits without a timeout")]
fn waiting_for_ever_fails_the_test_instead_of_hanging() {
    let _ = turn("hi").on_call("host.echo", |_| Answer::pending()).run(|turn: Turn| {
        echo(&turn)?.recv()?;
        Ok(())
    });
}

#[test]
fn a_panicking_worker_leaves_the_thread_ready_for_the_next_turn() {
    let panicked = std::panic::catch_unwind(|| turn("hi").run(|_| panic!("boom")));
    assert!(panicked.is_err());
    assert_eq!(turn("hi").run(|turn: Turn| Ok(turn.say("fine")?)).text(), "fine");
}
