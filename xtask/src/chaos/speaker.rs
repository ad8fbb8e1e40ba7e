//! A client: one conversation, one thing after another, each seen through to its end over as many connections and replicas as that takes.
//!
//! What it does next follows from its dice alone; how far it gets in the time depends on the machine. It never gives a message up that may have been
//! accepted: it sends it again with its key until somebody says so.

use std::rc::Rc;
use std::time::Duration;

use super::desk::{Answer, Asked, Desk, Org, lane_path};
use super::dice::Dice;
use super::reader::{PAUSE, follow};
use super::record::{At, End, LaneId, Manner, Read, Turn};

/// Within this a request that was not answered may still take effect: it waits in a stopped replica, or in a silent link.
const MURKY_MS: u64 = 25_000;

pub struct Speaker {
    desk: Rc<Desk>,
    dice: Dice,
    lane: LaneId,
    generation: u32,
    said: u64,
    /// The last turn that was known to be accepted.
    last: Option<usize>,
    /// Until then what was sent may still arrive.
    murky_until: At,
    /// How often it went to another conversation because nobody could say what had become of this one.
    moves: u32,
}

/// What a message asks for.
struct Wish {
    manner: Manner,
    pieces: u64,
    pause_ms: u64,
    on_busy: &'static str,
}

impl Speaker {
    pub fn new(desk: Rc<Desk>, seed: u64, org: &Org, index: usize) -> Speaker {
        let lane = LaneId { org: org.name.clone(), conversation: format!("c{index}") };
        let dice = Dice::new(seed, &lane.to_string());
        Speaker { desk, dice, lane, generation: 0, said: 0, last: None, murky_until: 0, moves: 0 }
    }

    fn org(&self) -> Org {
        self.desk.org(&self.lane).clone()
    }

    fn now(&self) -> At {
        self.desk.record.borrow().now()
    }

    fn count(&self, what: &'static str) {
        self.desk.record.borrow_mut().count(what);
    }

    /// Talks until there was enough of it.
    pub async fn talk(mut self) {
        while !self.desk.enough.get() {
            match self.dice.below(100) {
                0..60 => self.one().await,
                60..74 => self.burst().await,
                74..81 => self.cancel().await,
                81..88 => self.interrupt().await,
                88..91 => self.reject().await,
                91..97 => self.look_back().await,
                97..99 => self.peep().await,
                _ => self.delete().await,
            }
            let pause = Duration::from_millis(self.dice.below(250));
            tokio::time::sleep(pause).await;
        }
    }

    fn wish(&mut self) -> Wish {
        let manner = match self.dice.below(100) {
            0..86 => Manner::Say,
            86..92 => Manner::Trap,
            92..97 => Manner::Mute,
            _ => Manner::Spin,
        };
        let (pieces, pause_ms) = match self.dice.below(10) {
            0..4 => (self.dice.below(4), 0),
            4..8 => (self.dice.between(1, 10), self.dice.below(60)),
            _ => (self.dice.between(5, 25), self.dice.between(40, 120)),
        };
        Wish { manner, pieces, pause_ms, on_busy: "enqueue" }
    }

    fn long(&mut self) -> Wish {
        Wish {
            manner: Manner::Say,
            pieces: self.dice.between(10, 30),
            pause_ms: self.dice.between(40, 120),
            on_busy: "enqueue",
        }
    }

    /// Writes a message down before it is sent.
    fn begin(&mut self, wish: &Wish) -> usize {
        self.said += 1;
        // The same in every org: keys, conversations and agents of one must mean nothing to another.
        let key = format!("{}-{}", self.lane.conversation, self.said);
        let text = format!("{} {} {} {}.{key}", wish.manner.word(), wish.pieces, wish.pause_ms, self.lane.org);
        let mut record = self.desk.record.borrow_mut();
        let now = record.now();
        let turn = Turn::new(self.lane.clone(), key, text, wish.manner, now);
        record.begin(Turn { generation: self.generation, on_busy: wish.on_busy, after: self.last, ..turn })
    }

    /// Sends a message until it is accepted. `false`: the conversation was busy, and that was not what the message could wait for.
    async fn submit(&mut self, place: usize, wish: &Wish) -> bool {
        let (org, path) = (self.org(), lane_path(&self.lane));
        let (key, body) = self.sent(place);
        loop {
            let way = match self.dice.below(10) {
                0..5 => "Accept: text/event-stream",
                5..7 => "Prefer: wait=2",
                _ => "Accept: application/json",
            };
            self.desk.record.borrow_mut().turns[place].sends += 1;
            let headers = [key.as_str(), way];
            match self.desk.ask_for_stream(&mut self.dice, &org, ("POST", &path), &headers, &body).await {
                Asked::Stream(opened) => {
                    let Some(id) = opened.turn.clone() else {
                        let what = "a submission's stream has no Location".to_owned();
                        self.desk.record.borrow_mut().violation("E2", what, vec![place]);
                        continue;
                    };
                    self.desk.record.borrow_mut().accepted(place, &id);
                    let (patience, enough) = self.attention();
                    // An earlier attempt may have been read already: this stream begins anew all the same.
                    self.desk.read(place, opened, None, patience, enough).await;
                    return true;
                }
                Asked::Answer(answer) => match answer.status {
                    200 | 202 => {
                        let id = answer.body["turn_id"].as_str().or(answer.body["id"].as_str());
                        let id = id.unwrap_or_default().to_owned();
                        self.desk.record.borrow_mut().accepted(place, &id);
                        if answer.status == 200 {
                            self.note(place, &answer);
                        }
                        return true;
                    }
                    409 if wish.on_busy == "reject" => return false,
                    429 | 500..=599 => self.pause().await,
                    status => {
                        let what = format!("a message was answered with {status}: {}", answer.body);
                        self.desk.record.borrow_mut().violation("T1", what, vec![place]);
                        self.pause().await;
                    }
                },
                Asked::Nothing => {
                    self.murky_until = self.now() + MURKY_MS;
                    self.pause().await;
                }
            }
        }
    }

    /// The key and the body of a message: the same each time that it is sent.
    fn sent(&self, place: usize) -> (String, String) {
        let turn = &self.desk.record.borrow().turns[place];
        let body = serde_json::json!({"message": {"text": turn.text}, "on_busy": turn.on_busy});
        (format!("Idempotency-Key: {}", turn.key), body.to_string())
    }

    async fn pause(&mut self) {
        tokio::time::sleep(PAUSE.mul_f64(0.5 + self.dice.below(100) as f64 / 100.0)).await;
    }

    /// How long a reader waits for the next event, and after how many events it leaves.
    fn attention(&mut self) -> (Duration, usize) {
        let patience = Duration::from_millis(self.dice.between(400, 4_000));
        let enough = if self.dice.percent(45) { self.dice.between(1, 12) as usize } else { usize::MAX };
        (patience, enough)
    }

    fn note(&self, place: usize, answer: &Answer) {
        let mut record = self.desk.record.borrow_mut();
        let at = record.now();
        let end = End::of_turn(&answer.body);
        record.turns[place].reads.push(Read { at, replica: answer.replica, end });
    }

    /// Follows an accepted turn to its end.
    async fn follow(&mut self, place: usize) {
        follow(&self.desk, &mut self.dice, place).await;
    }

    /// Reads the resource of a turn that is over, from whichever replica answers.
    async fn check(&mut self, place: usize) {
        let (id, gone, deleted) = {
            let turn = &self.desk.record.borrow().turns[place];
            (turn.id.clone(), turn.gone_at.is_some(), turn.deleted_at.is_some())
        };
        let (Some(id), org) = (id, self.org()) else { return };
        for _ in 0..20 {
            match self.desk.ask(&mut self.dice, &org, ("GET", &format!("/v1/turns/{id}")), &[], "").await {
                Some(answer) if answer.status == 200 && !gone => return self.note(place, &answer),
                Some(answer) if answer.status == 404 && deleted => return,
                Some(answer) if answer.status == 200 || answer.status == 404 => {
                    let what = format!(
                        "turn {id} was {}; now its status is {}",
                        if gone { "gone" } else { "there" },
                        answer.status
                    );
                    self.desk.record.borrow_mut().violation("T1", what, vec![place]);
                    return;
                }
                _ => self.pause().await,
            }
        }
    }

    /// A message, and its end.
    async fn one(&mut self) {
        let wish = self.wish();
        let place = self.begin(&wish);
        self.submit(place, &wish).await;
        self.last = Some(place);
        self.follow(place).await;
        if self.dice.percent(40) {
            self.check(place).await;
        }
        self.count("single messages");
    }

    /// Several messages, one after the other is accepted; then their ends.
    async fn burst(&mut self) {
        let messages = self.dice.between(2, 6);
        let mut places = Vec::new();
        for _ in 0..messages {
            let wish = self.wish();
            let place = self.begin(&wish);
            self.submit(place, &wish).await;
            self.last = Some(place);
            places.push(place);
        }
        // The last first: it may be the end of one whose predecessors nobody has read yet.
        for place in places.into_iter().rev() {
            self.follow(place).await;
        }
        self.count("bursts of messages");
    }

    /// A message that is cancelled while it runs, or waits, or when it is too late.
    async fn cancel(&mut self) {
        let wish = self.long();
        let place = self.begin(&wish);
        self.submit(place, &wish).await;
        self.last = Some(place);
        tokio::time::sleep(Duration::from_millis(self.dice.below(800))).await;
        let (id, org) = (self.desk.record.borrow().turns[place].id.clone().expect("it was accepted"), self.org());
        {
            let mut record = self.desk.record.borrow_mut();
            let now = record.now();
            record.turns[place].cancelled_at.get_or_insert(now);
        }
        loop {
            let path = format!("/v1/turns/{id}/cancel");
            match self.desk.ask(&mut self.dice, &org, ("POST", &path), &[], "").await {
                Some(answer) if answer.status == 200 => {
                    let state = answer.body["state"].as_str().unwrap_or_default().to_owned();
                    let final_state = matches!(state.as_str(), "completed" | "failed" | "cancelled");
                    self.follow(place).await;
                    let told = self.desk.record.borrow().turns[place].told();
                    if final_state && told.as_ref().is_some_and(|told| told.state != state) {
                        let what = format!("cancel answered {state}, and the turn ended {}", told.expect("it has"));
                        self.desk.record.borrow_mut().violation("T8", what, vec![place]);
                    }
                    break;
                }
                Some(answer) if answer.status == 404 => {
                    let what = format!("cancelling turn {id}, which was accepted, is answered with 404");
                    self.desk.record.borrow_mut().violation("T1", what, vec![place]);
                    break;
                }
                _ => self.pause().await,
            }
        }
        self.follow(place).await;
        self.count("cancels");
    }

    /// Some messages, and one that ends them all.
    async fn interrupt(&mut self) {
        let mut places = Vec::new();
        for _ in 0..self.dice.between(1, 4) {
            let wish = self.long();
            let place = self.begin(&wish);
            self.submit(place, &wish).await;
            self.last = Some(place);
            places.push(place);
        }
        tokio::time::sleep(Duration::from_millis(self.dice.below(600))).await;
        {
            let mut record = self.desk.record.borrow_mut();
            let now = record.now();
            for &place in &places {
                record.turns[place].cancelled_at.get_or_insert(now);
            }
        }
        let wish = Wish { on_busy: "interrupt", ..self.wish() };
        let place = self.begin(&wish);
        self.submit(place, &wish).await;
        self.last = Some(place);
        self.follow(place).await;
        for place in places {
            self.follow(place).await;
        }
        self.count("interrupts");
    }

    /// A message that will not wait.
    async fn reject(&mut self) {
        let busy = self.dice.percent(60);
        let mut before = None;
        if busy {
            let wish = self.long();
            let place = self.begin(&wish);
            self.submit(place, &wish).await;
            self.last = Some(place);
            before = Some(place);
        }
        let wish = Wish { on_busy: "reject", ..self.wish() };
        let place = self.begin(&wish);
        if self.submit(place, &wish).await {
            self.last = Some(place);
            self.follow(place).await;
        }
        if let Some(before) = before {
            self.follow(before).await;
        }
        self.count("messages that do not wait");
    }

    /// An old turn again: its resource, its stream, its key.
    async fn look_back(&mut self) {
        let old: Vec<usize> = {
            let record = self.desk.record.borrow();
            let lane = record.lanes.get(&self.lane).map(Vec::as_slice).unwrap_or_default();
            let old = lane.iter().copied().rev().take(40);
            old.filter(|&place| record.turns[place].deleted_at.is_none() && record.turns[place].told().is_some())
                .collect()
        };
        if old.is_empty() {
            return;
        }
        let place = self.dice.of(&old);
        let org = self.org();
        match self.dice.below(3) {
            0 => self.check(place).await,
            1 => {
                let id = self.desk.record.borrow().turns[place].id.clone().expect("it was accepted");
                if let Asked::Stream(opened) = self.desk.events(&mut self.dice, &org, &id, None).await {
                    self.desk.read(place, opened, None, Duration::from_secs(3), usize::MAX).await;
                }
            }
            _ => {
                let ((key, body), path) = (self.sent(place), lane_path(&self.lane));
                let asked = self.desk.ask(&mut self.dice, &org, ("POST", &path), &[&key], &body).await;
                match asked {
                    Some(answer) if answer.status == 202 => {
                        let id = answer.body["turn_id"].as_str().unwrap_or_default().to_owned();
                        let mut record = self.desk.record.borrow_mut();
                        record.accepted(place, &id);
                        if !answer.replayed {
                            let what = "an old key is answered without Idempotent-Replayed".to_owned();
                            record.violation("T1", what, vec![place]);
                        }
                    }
                    Some(answer) if answer.status < 429 => {
                        let what = format!("an old key is answered with {}: {}", answer.status, answer.body);
                        self.desk.record.borrow_mut().violation("T1", what, vec![place]);
                    }
                    Some(_) => {}
                    None => self.murky_until = self.now() + MURKY_MS,
                }
            }
        }
        self.count("looks back");
    }

    /// O1: what is another org's is not there, whatever one asks; and what one lists is one's own.
    async fn peep(&mut self) {
        let foreign: Vec<(String, usize)> = {
            let record = self.desk.record.borrow();
            let turns = record.turns.iter().enumerate().rev().take(200);
            let turns = turns.filter(|(_, turn)| turn.lane.org != self.lane.org);
            turns.filter_map(|(place, turn)| Some((turn.id.clone()?, place))).collect()
        };
        let org = self.org();
        if !foreign.is_empty() {
            let (id, place) = foreign[self.dice.below(foreign.len() as u64) as usize].clone();
            let (method, path) = match self.dice.below(3) {
                0 => ("GET", format!("/v1/turns/{id}")),
                1 => ("GET", format!("/v1/turns/{id}/events")),
                _ => ("POST", format!("/v1/turns/{id}/cancel")),
            };
            let answer = self.desk.ask(&mut self.dice, &org, (method, &path), &[], "").await;
            if let Some(answer) = answer
                && !matches!(answer.status, 404 | 406 | 429 | 500..=599)
            {
                let what =
                    format!("{} asked {method} {path} of another org: {} {}", org.name, answer.status, answer.body);
                self.desk.record.borrow_mut().violation("O1", what, vec![place]);
            }
        }
        let path = format!("/v1/agents/{}/conversations/{}/messages", super::desk::AGENT, self.lane.conversation);
        let answer = self.desk.ask(&mut self.dice, &org, ("GET", &path), &[], "").await;
        if let Some(answer) = answer.filter(|answer| answer.status == 200) {
            let own = format!(" {}.", org.name);
            for item in answer.body["items"].as_array().into_iter().flatten() {
                let text = item["message"]["text"].as_str().unwrap_or_default();
                if !text.contains(&own) {
                    let what = format!("{} reads the message {text:?} in {}", org.name, self.lane);
                    self.desk.record.borrow_mut().violation("O1", what, vec![]);
                }
            }
        }
        self.count("looks at other orgs");
    }

    /// Deletes the conversation, perhaps with a turn in its midst, and begins anew.
    async fn delete(&mut self) {
        let mut live = None;
        if self.dice.percent(60) {
            let wish = self.long();
            let place = self.begin(&wish);
            self.submit(place, &wish).await;
            self.last = Some(place);
            live = Some(place);
        }
        {
            let mut record = self.desk.record.borrow_mut();
            let now = record.now();
            for place in record.lanes.get(&self.lane).cloned().unwrap_or_default() {
                record.turns[place].deleted_at.get_or_insert(now);
            }
        }
        let (org, path) =
            (self.org(), format!("/v1/agents/{}/conversations/{}", super::desk::AGENT, self.lane.conversation));
        loop {
            match self.desk.ask(&mut self.dice, &org, ("DELETE", &path), &[], "").await {
                Some(answer) if matches!(answer.status, 204 | 404) => break,
                Some(_) => {}
                None => self.murky_until = self.now() + MURKY_MS,
            }
            // A refusal for want of a database may have been one too early.
            self.murky_until = self.now() + MURKY_MS;
            self.pause().await;
        }
        if let Some(place) = live {
            self.follow(place).await;
            self.check(place).await;
        }
        if self.now() < self.murky_until {
            // A deletion or a message that is still on its way would meet what comes now.
            self.moves += 1;
            let conversation = self.lane.conversation.split('m').next().unwrap_or_default();
            self.lane.conversation = format!("{conversation}m{}", self.moves);
            self.generation = 0;
        } else {
            self.generation += 1;
        }
        self.last = None;
        self.count("deletions");
    }
}
