//! Runs `worker.js`, which is part of the program, in an interpreter: the WebAssembly module is the interpreter.
//!
//! The script sees the turn as global values: `message` and `state` (a string, or null), and the functions `say(text)`, `reply(text)`,
//! `save(text)` and `log(text)`. What it throws ends the turn, and leaves the state as it was. Everything that an author writes is in the
//! script; a host operation that scripts should have is one more function here.

use std::error::Error;

use boa_engine::property::Attribute;
use boa_engine::{Context, JsNativeError, JsResult, JsString, JsValue, NativeFunction, Source, js_string};
use turnhouse_guest::{self as th, Level, Turn, WorkerResult};

const SCRIPT: &str = include_str!("../worker.js");

fn main() {
    th::run(worker);
}

fn worker(turn: Turn) -> WorkerResult {
    // The interpreter's functions outlive this one's frame, as far as the compiler knows; the program ends with its turn.
    let turn: &'static Turn = Box::leak(Box::new(turn));
    let mut context = Context::default();
    give_turn(turn, &mut context).map_err(thrown)?;
    context.eval(Source::from_bytes(SCRIPT)).map_err(thrown)?;
    // What promises still have to do.
    context.run_jobs().map_err(thrown)?;
    Ok(())
}

fn give_turn(turn: &'static Turn, context: &mut Context) -> JsResult<()> {
    let state = match turn.state_bytes().map_err(failed)? {
        Some(bytes) => JsString::from(String::from_utf8(bytes).map_err(failed)?).into(),
        None => JsValue::null(),
    };
    context.register_global_property(js_string!("message"), JsString::from(turn.text()), Attribute::READONLY)?;
    context.register_global_property(js_string!("state"), state, Attribute::READONLY)?;
    give_function("say", context, |text| turn.say(text))?;
    give_function("reply", context, |text| turn.reply(text))?;
    give_function("save", context, |text| turn.save_bytes(text.as_bytes()).map(drop))?;
    give_function("log", context, |line| Ok(turn.log(Level::Info, line)))
}

/// A global function of one text.
fn give_function(
    name: &'static str,
    context: &mut Context,
    does: impl Fn(&str) -> Result<(), th::Error> + Copy + 'static,
) -> JsResult<()> {
    let function = NativeFunction::from_copy_closure(move |_, arguments, context| {
        let text = arguments.first().unwrap_or(&JsValue::undefined()).to_string(context)?;
        // A lone surrogate is no text: it becomes U+FFFD.
        does(&text.to_std_string_lossy()).map_err(failed)?;
        Ok(JsValue::undefined())
    });
    context.register_global_builtin_callable(JsString::from(name), 1, function)
}

/// An error that the script can catch.
fn failed(error: impl Error) -> boa_engine::JsError {
    JsNativeError::error().with_message(error.to_string()).into()
}

/// One that it did not catch. The interpreter's errors hold values of its heap: only their text can leave it.
fn thrown(error: boa_engine::JsError) -> Box<dyn Error> {
    error.to_string().into()
}
