//! Tests of server.rs that need no network: what no transcript can show, a model that the room is
//! checked against, and a flood of garbage. Part of the server's own module, so that they see all
//! of it.

use super::*;
use os::chance::Chance;
use std::io::BufRead as _;
use std::net::{TcpListener, TcpStream};

// The wire

/// All that a decoder finds in `pieces`, as text.
fn decode(pieces: &[&[u8]]) -> Vec<String> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        while let Some(decoded) = decoder.next(&mut input) {
            found.push(match decoded {
                Decoded::Line(line) => format!("line {}", line.escape_ascii()),
                Decoded::TooLong(line) => format!("too long {}", line.len()),
                Decoded::TelnetAnswer(answer) => format!("answer {answer:?}"),
            });
        }
        assert!(input.is_empty());
    }
    found
}

#[test]
fn lines_do_not_depend_on_how_they_are_cut() {
    let stream = b"MSG a\r\n\nMSG \xff\xfd\n b\x08c\xff\xfa\x01\n\xff\xff\xf0\xff\xf0\r\0d\xff\xff\r\xff\xf1\n\0\n";
    let whole = decode(&[stream]);
    let expected =
        ["line MSG a", "answer [255, 252, 10]", "line MSG  c", "line d\\xff", "line \\x00"];
    assert_eq!(whole, expected);
    for cut in 0..=stream.len() {
        assert_eq!(decode(&[&stream[..cut], &stream[cut..]]), whole, "cut at {cut}");
    }
    let bytes: Vec<&[u8]> = stream.chunks(1).collect();
    assert_eq!(decode(&bytes), whole);
}

#[test]
fn a_line_is_too_long_with_its_4001st_byte() {
    let at_limit = [b'x'; MAX_REQUEST];
    assert_eq!(decode(&[&at_limit]), Vec::<String>::new());
    assert_eq!(decode(&[&at_limit, b"\r"]), Vec::<String>::new());
    assert_eq!(decode(&[&at_limit, b"\r\n"]).len(), 1);
    assert_eq!(decode(&[&at_limit, b"x"]), ["too long 4000"]);
    assert_eq!(decode(&[&at_limit, b"\r", b"x\nnext\n"]), ["too long 4001", "line next"]);
    assert_eq!(decode(&[&at_limit, b"\r\0next\n"]).len(), 2);
    assert_eq!(decode(&[&at_limit, b"\r\xff\xf1\0next\n"]), ["too long 4001", "line next"]);
    // Telnet is understood in what is skipped, and CR NUL ends it.
    let skipped: &[u8] = b"xx\xff\xfd\x06\0\r\xff\xf1\0next\n";
    assert_eq!(
        decode(&[&at_limit, skipped]),
        ["too long 4000", "answer [255, 252, 6]", "line next"]
    );
    // However much follows, it is reported once and held nowhere.
    let mut decoder = Decoder::default();
    let mut found = 0;
    for _ in 0..1000 {
        let mut input = at_limit.as_slice();
        while decoder.next(&mut input).is_some() {
            found += 1;
        }
    }
    assert_eq!(found, 1);
    assert!(decoder.is_between_lines());
}

#[test]
fn a_roster_line_is_filled_to_its_last_byte() {
    // "USERS 9", a space and a name, CRLF: 4086 bytes of name are just 4096.
    let long = "x".repeat(MAX_LINE - "USERS 9 \r\n".len() - " y".len());
    for (names, lines) in [(vec![&*long, "y"], 1), (vec![&*long, "yy"], 2), (vec!["y", &*long], 1)]
    {
        let text = String::from_utf8(roster(9, names.iter().copied())).unwrap();
        assert_eq!(text.split_terminator("\r\n").count(), lines);
        assert!(text.split_inclusive("\r\n").all(|line| line.len() <= MAX_LINE));
        let words = text.split_whitespace().filter(|word| !["USERS", "9"].contains(word));
        assert_eq!(words.collect::<Vec<_>>(), names);
    }
}

#[test]
fn names_of_every_kind_of_letter_and_digit() {
    for good in ["a", "7", "Ⅷ", "½", "ß", "क", "李雷", "a_b-c.", "Jose\u{301}", "हिन्दी", "ชื่อ"]
    {
        assert!(is_good_name(good), "{good}");
    }
    assert!(is_good_name(&"é".repeat(25)) && !is_good_name(&"é".repeat(26)));
    // Rare marks that only a list tells: Mc, and not Alphabetic.
    assert!("\u{f3e}\u{f3f}\u{1ce1}\u{1cf7}\u{abec}".chars().all(is_mark));
    for bad in ["", "_", "a b", "\u{301}a", "\u{345}a", "é\u{200b}", "🙂", "a@b", "ana\u{3164}"]
    {
        assert!(!is_good_name(bad), "{bad}");
    }
    for bad in "\u{34f}\u{115f}\u{180b}\u{180f}\u{fe0f}\u{ffa0}\u{e0100}\u{24b6}\u{1f189}".chars() {
        assert!(!is_good_name(&format!("a{bad}")), "{}", bad.escape_unicode());
    }
}

// The room

/// What a protocol's reader would write down, without a thought for speed: everybody's lines are
/// put into everybody's output at once.
#[derive(Default)]
struct Model {
    connections: BTreeMap<Id, ModelConnection>,
    /// Who is in the room, in the order of joining.
    people: Vec<(Id, String)>,
}

#[derive(Default)]
struct ModelConnection {
    output: Vec<u8>,
    /// What has come of the current line, and how much of what it holds has been dealt with.
    received: Vec<u8>,
    dealt_with: usize,
    has_spoken: bool,
}

/// What stands in a line that may not be complete, in order.
enum Found {
    Answer([u8; 3]),
    TooLong(Vec<u8>),
    Line(Vec<u8>),
}

/// Looks through the bytes of a line from its beginning. Returns also where it ends, if it does.
fn look_through(bytes: &[u8]) -> (Vec<Found>, Option<usize>) {
    let mut found = Vec::new();
    let mut text: Vec<u8> = Vec::new();
    let mut is_long = false;
    // The last byte of text, also of what is thrown away.
    let mut last = 0;
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let size = match rest {
            [255, 250, inside @ ..] => {
                // The end must not be looked for inside a doubled 255 that starts before it.
                let mut end = 0;
                while end + 1 < inside.len() && inside[end..end + 2] != [255, 240] {
                    end += if inside[end] == 255 { 2 } else { 1 };
                }
                (end + 1 < inside.len()).then_some(2 + end + 2)
            }
            [255, 251..=254, _, ..] => Some(3),
            [255, 251..=254] | [255] => None,
            [255, _, ..] => Some(2),
            _ => Some(1),
        };
        let end = at + size.unwrap_or(rest.len());
        let ends_line = rest[0] == b'\n' || (rest[0] == 0 && last == b'\r');
        let ends_line = ends_line || rest.starts_with(b"\r\n") || rest.starts_with(b"\r\0");
        let may_end_line = at == MAX_REQUEST && rest == b"\r";
        if end > MAX_REQUEST && !is_long && !ends_line && !may_end_line {
            is_long = true;
            if rest[0] == b'\r' && at == MAX_REQUEST {
                text.push(b'\r');
            }
            found.push(Found::TooLong(text.clone()));
        }
        match (rest, size) {
            (_, None) => return (found, None),
            ([b'\n', ..], _) | ([0, ..], _) if rest[0] == b'\n' || last == b'\r' => {
                if text.last() == Some(&b'\r') {
                    text.pop();
                }
                if !is_long && !text.is_empty() {
                    found.push(Found::Line(text));
                }
                return (found, Some(at + 1));
            }
            ([255, 251, option, ..], _) => found.push(Found::Answer([255, 254, *option])),
            ([255, 253, option, ..], _) => found.push(Found::Answer([255, 252, *option])),
            ([255, 255, ..], _) => {
                text.push(255);
                last = 255;
            }
            ([255, ..], _) => {}
            ([8 | 127, ..], _) => {
                while text.pop().is_some_and(|byte| (128..192).contains(&byte)) {}
                last = if is_long { last } else { text.last().copied().unwrap_or(0) };
            }
            _ => {
                text.push(rest[0]);
                last = rest[0];
            }
        }
        at = end;
    }
    (found, None)
}

impl Model {
    fn receive(&mut self, id: Id, bytes: &[u8]) {
        self.connections.get_mut(&id).unwrap().received.extend(bytes);
        while let Some(connection) = self.connections.get_mut(&id) {
            let (found, end) = look_through(&connection.received);
            let dealt_with = std::mem::replace(&mut connection.dealt_with, found.len());
            if let Some(end) = end {
                connection.received.drain(..end);
                connection.dealt_with = 0;
            }
            for found in found.into_iter().skip(dealt_with) {
                match found {
                    Found::Answer(answer) => self.output(id).extend(answer),
                    Found::TooLong(text) => self.line(id, &text, true),
                    Found::Line(text) => self.line(id, &text, false),
                }
                if !self.is_open(id) {
                    return;
                }
            }
            if end.is_none() {
                return;
            }
        }
    }

    fn is_open(&self, id: Id) -> bool {
        self.connections.get(&id).is_some_and(|connection| connection.dealt_with != usize::MAX)
    }

    fn output(&mut self, id: Id) -> &mut Vec<u8> {
        &mut self.connections.get_mut(&id).unwrap().output
    }

    fn say(&mut self, id: Id, line: &str) {
        self.output(id).extend(format!("{line}\r\n").into_bytes());
    }

    fn say_to_room(&mut self, but: Id, line: &str) {
        for (id, _) in self.people.clone() {
            if id != but {
                self.say(id, line);
            }
        }
    }

    fn roster(&self) -> String {
        let names: Vec<_> = self.people.iter().map(|(_, name)| name.clone()).collect();
        format!("USERS {} {}", names.len(), names.join(" "))
    }

    fn leave(&mut self, id: Id, reason: &str) {
        let Some(at) = self.people.iter().position(|(other, _)| *other == id) else { return };
        let (_, name) = self.people.remove(at);
        self.say_to_room(id, &format!("LEFT {name} {} {reason}", self.people.len()));
        self.say_to_room(id, &self.roster());
    }

    fn line(&mut self, id: Id, line: &[u8], is_long: bool) {
        let connection = self.connections.get_mut(&id).unwrap();
        let is_first = !std::mem::replace(&mut connection.has_spoken, true);
        let name = self.people.iter().find(|(other, _)| *other == id).map(|(_, name)| name.clone());
        let upper = String::from_utf8_lossy(line).to_ascii_uppercase();
        let methods = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT PRI";
        let mut methods = methods.split(' ').map(|method| format!("{method} "));
        let is_http = is_long || line.windows(6).any(|bytes| bytes == b" HTTP/");
        if is_first && (is_http || line[..1] == [22] || methods.any(|it| upper.starts_with(&it))) {
            self.say(id, "ERR usage");
            self.connections.get_mut(&id).unwrap().dealt_with = usize::MAX;
            return;
        }
        let error = match std::str::from_utf8(line) {
            _ if is_long => "line-too-long",
            Ok(text) if !text.contains(is_bad) => match self.request(id, name, text) {
                Ok(()) => return,
                Err(error) => error,
            },
            _ => "bad-text",
        };
        self.say(id, &format!("ERR {error}"));
    }

    fn request(&mut self, id: Id, name: Option<String>, text: &str) -> Result<(), &'static str> {
        let mut words = text.splitn(2, ' ');
        let verb = words.next().unwrap_or_default().to_ascii_uppercase();
        let argument = words.next().unwrap_or_default();
        let plain = argument.trim_matches(' ').is_empty();
        match (verb.as_str(), &name) {
            ("NAME", Some(_)) => return Err("already-named"),
            ("MSG" | "PRIV" | "LIST", None) => return Err("not-named"),
            ("NAME" | "MSG" | "PRIV" | "LIST" | "PING" | "HELP" | "QUIT", _) => {}
            _ => return Err("unknown-command"),
        }
        let name = name.unwrap_or_default();
        match verb.as_str() {
            "NAME" | "MSG" if argument.is_empty() => return Err("usage"),
            "LIST" | "HELP" | "QUIT" if !plain => return Err("usage"),
            "NAME" => {
                if !is_good_name(argument) {
                    return Err("bad-name");
                }
                let lower = argument.to_lowercase();
                if self.people.iter().any(|(_, name)| name.to_lowercase() == lower) {
                    return Err("name-taken");
                }
                self.people.push((id, argument.to_owned()));
                let count = self.people.len();
                self.say(id, &format!("WELCOME {argument} {count}"));
                self.say_to_room(id, &format!("JOINED {argument} {count}"));
                self.say_to_room(Id::MAX, &self.roster());
            }
            "MSG" => self.say_to_room(id, &format!("MSG {name} {argument}")),
            "PRIV" => {
                let Some((to, text)) = argument.split_once(' ') else { return Err("usage") };
                let Some(to) = to.strip_prefix('@') else { return Err("usage") };
                if to.is_empty() || text.is_empty() {
                    return Err("usage");
                }
                let lower = to.to_lowercase();
                let found = self.people.iter().find(|(_, name)| name.to_lowercase() == lower);
                let Some((to, to_name)) = found.cloned() else { return Err("no-such-user") };
                self.say(to, &format!("PRIV {name} {text}"));
                self.say(id, &format!("SENT {to_name} {text}"));
            }
            "LIST" => self.say(id, &self.roster()),
            "PING" if argument.is_empty() => self.say(id, "PONG"),
            "PING" => self.say(id, &format!("PONG {argument}")),
            "HELP" => (0..7).for_each(|_| self.say(id, "HELP")),
            _ => {
                self.say(id, "BYE");
                self.leave(id, "quit");
                self.connections.get_mut(&id).unwrap().dealt_with = usize::MAX;
            }
        }
        Ok(())
    }
}

fn is_bad(c: char) -> bool {
    let code = c as u32;
    (code < 32 && code != 9)
        || (127..160).contains(&code)
        || [0x2028, 0x2029].contains(&code)
        || (0x202a..=0x202e).contains(&code)
        || (0x2066..=0x2069).contains(&code)
}

/// The room with decoders in front of it, and the model beside it.
#[derive(Default)]
struct World {
    room: Room,
    decoders: BTreeMap<Id, Decoder>,
    has_spoken: [bool; 8],
    model: Model,
}

impl World {
    fn connect(&mut self, id: Id) {
        self.room.connect(id);
        self.decoders.insert(id, Decoder::default());
        self.has_spoken[id] = false;
        self.model.connections.insert(id, ModelConnection::default());
        self.model.say(id, "HELLO");
    }

    fn receive(&mut self, id: Id, bytes: &[u8]) {
        let Some(mut decoder) = self.decoders.remove(&id) else { return };
        self.model.receive(id, bytes);
        let mut input = bytes;
        while let Some(decoded) = decoder.next(&mut input) {
            let is_first = !mem::replace(&mut self.has_spoken[id], true);
            let request = match decoded {
                Decoded::TelnetAnswer(answer) => {
                    self.has_spoken[id] = !is_first;
                    self.room.delivery.put(id, Kind::Reply, &answer);
                    continue;
                }
                found if is_first && is_not_a_person(&found) => {
                    self.room.refuse(id, NOT_A_PERSON);
                    assert!(!self.model.is_open(id));
                    return;
                }
                Decoded::Line(line) => parse(line, self.room.is_named(id)),
                Decoded::TooLong(_) => Err(LINE_TOO_LONG),
            };
            let cost = request.map_or(0, |request| self.room.cost(id, request));
            let caused = self.room.delivery.caused();
            let outcome = request.map(|request| self.room.carry_out(id, request));
            let has_quit = outcome == Ok(Outcome::Quit);
            match outcome {
                Err(refusal) => self.room.refuse(id, refusal),
                Ok(_) if has_quit => drop(self.room.leave(id, Reason::Quit)),
                Ok(_) => {}
            }
            assert_eq!(self.room.delivery.caused() - caused, cost, "what a request costs");
            assert_eq!(has_quit, !self.model.is_open(id));
            if has_quit {
                return;
            }
        }
        self.decoders.insert(id, decoder);
    }

    /// The connection ends; what it was owed is compared a last time.
    fn disconnect(&mut self, id: Id, reason: Reason) {
        let cost = self.room.cost_of_leaving(id, reason);
        let caused = self.room.delivery.caused();
        self.room.leave(id, reason);
        assert_eq!(self.room.delivery.caused() - caused, cost, "what a leave costs");
        self.model.leave(id, reason.word());
        self.end_turn();
        self.room.delivery.outboxes.remove(id);
        self.decoders.remove(&id);
        self.model.connections.remove(&id);
    }

    /// Sends everybody what they are owed, and compares it with what the model says.
    fn end_turn(&mut self) {
        for (&id, connection) in &mut self.model.connections {
            let expected = mem::take(&mut connection.output);
            let delivery = &mut self.room.delivery;
            let sent = delivery.pending(id).expect("an outbox").concat();
            assert!(delivery.settle(id, sent.len()));
            check_output(&sent);
            assert_eq!(without_free_text(&sent), without_free_text(&expected));
        }
        self.room.delivery.pending_writes.clear();
        self.room.delivery.end_turn();
        assert_eq!(self.room.count(), self.model.people.len());
    }
}

/// The lines and telnet answers that were sent to a client.
fn split(output: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    let mut rest = output;
    while !rest.is_empty() {
        let end = match rest {
            [255, 252 | 254, _, ..] => 3,
            _ => 1 + rest.iter().position(|&byte| byte == b'\n').expect("a line without an end"),
        };
        let (piece, after) = rest.split_at(end);
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Takes away what the protocol leaves free: the texts of HELLO, ERR, BYE and HELP.
fn without_free_text(output: &[u8]) -> String {
    let shorten = |piece: &[u8]| {
        let line = piece.escape_ascii().to_string();
        let words: Vec<&str> = line.trim_end_matches("\\r\\n").splitn(3, ' ').collect();
        match words.as_slice() {
            ["ERR", code, ..] => format!("ERR {code}\n"),
            [keyword @ ("HELLO" | "BYE" | "HELP"), ..] => format!("{keyword}\n"),
            _ => line + "\n",
        }
    };
    split(output).into_iter().map(shorten).collect()
}

fn is_not_a_person(first: &Decoded) -> bool {
    !matches!(first, Decoded::Line(line) if !is_foreign(line))
}

/// What holds of every line to a client, whoever sent what.
fn check_output(output: &[u8]) {
    for line in split(output).into_iter().filter(|piece| piece[0] != 255) {
        assert!(line.len() <= MAX_LINE);
        let line = std::str::from_utf8(line).expect("a line that is not UTF-8");
        let line = line.strip_suffix("\r\n").expect("a line without CRLF");
        assert!(!line.contains(is_bad), "{line:?}");
        let known = "HELLO WELCOME JOINED LEFT USERS MSG PRIV SENT PONG HELP BYE ERR";
        let keyword = line.split(' ').next().unwrap_or_default();
        assert!(known.split(' ').any(|known| known == keyword), "{line:?}");
    }
}

fn pick<T: Copy>(chance: &mut Chance, from: &[T]) -> T {
    from[chance.below(from.len())]
}

const NAMES: [&str; 8] = ["ana", "Ana", "bob", "σοφία", "ΣΟΦΊΑ", "李雷", "x.y", "b b"];

fn random_request(chance: &mut Chance) -> Vec<u8> {
    let name = pick(chance, &NAMES);
    let text =
        pick(chance, &["hi", " two  spaces ", "é\t🙂", "", " ", "@bob x", "\u{202e}", "\u{9b}2J"]);
    let mut line = match chance.below(16) {
        0..=3 => format!("NAME {name}"),
        4..=6 => format!("MSG {text}"),
        7..=9 => format!("PRIV @{name} {text}"),
        10 => "list".to_owned(),
        11 => format!("PING {text}"),
        12 => pick(chance, &["HELP", "QUIT", "LIST x", "MSG", "GET / HTTP/1.1"]).to_owned(),
        13 => pick(chance, &["PRIV bob x", "PRIV @", "PRIV @ x", "NAME", " MSG x", ""]).to_owned(),
        14 if chance.below(50) == 0 => {
            let length = MAX_REQUEST - 5 + chance.below(10);
            format!("MSG {}", "x".repeat(length))
        }
        _ => format!("{text}{name}"),
    }
    .into_bytes();
    for _ in 0..chance.below(8).saturating_sub(4) {
        let special = [255, 251, 252, 253, 254, 250, 240, 8, 127, 13, 10, 0, 27, 128, 195, 9];
        let at = chance.below(line.len() + 1);
        match chance.below(3) {
            0 if at < line.len() => line[at] = chance.below(256) as u8,
            1 if at < line.len() => drop(line.remove(at)),
            _ => line.insert(at, pick(chance, &special)),
        }
    }
    line.extend(pick(chance, &[b"\n".as_slice(), b"\r\n"]));
    line
}

/// A million requests in release, fewer where the checks cost more: joins, talk, whispers, lists,
/// clashes and leaves of up to eight clients, whole and mutated, cut anywhere. What each is expected
/// to cost is what it then causes for others.
#[test]
fn the_room_does_what_the_model_does_whatever_is_sent() {
    let requests = if cfg!(debug_assertions) { 50_000 } else { 1_000_000 };
    let mut chance = Chance(0x9E37_79B9_7F4A_7C15);
    let mut world = World::default();
    for _ in 0..requests {
        let id = chance.below(8);
        if !world.decoders.contains_key(&id) || chance.below(200) == 0 {
            if world.model.connections.contains_key(&id) {
                let reason = pick(&mut chance, &[Reason::Disconnected, Reason::Slow]);
                world.disconnect(id, reason);
            }
            world.connect(id);
        }
        let bytes = random_request(&mut chance);
        let cut = chance.below(bytes.len() + 1);
        world.receive(id, &bytes[..cut]);
        if chance.below(4) == 0 {
            world.end_turn();
        }
        world.receive(id, &bytes[cut..]);
        if chance.below(4) == 0 {
            world.end_turn();
        }
    }
    world.end_turn();
}

/// Everything that a client is owed is taken.
fn deliver(delivery: &mut Delivery, id: Id) {
    let length = delivery.pending(id).map_or(0, |pending| pending.concat().len());
    assert!(delivery.settle(id, length));
}

#[test]
fn an_outbox_knows_of_each_byte_whether_it_is_a_reply() {
    let mut chance = Chance(1);
    let mut outbox = Outbox::default();
    let mut kinds: VecDeque<Kind> = VecDeque::new();
    for _ in 0..10_000 {
        if chance.below(3) == 0 {
            let taken = chance.below(kinds.len() + 1);
            outbox.take(taken);
            kinds.drain(..taken);
        } else {
            let (kind, length) =
                (pick(&mut chance, &[Kind::Event, Kind::Reply]), 1 + chance.below(3));
            outbox.append(kind, &[b'x'; 3][..length]);
            kinds.extend(&[kind; 3][..length]);
        }
        let replies = kinds.iter().filter(|&&kind| kind == Kind::Reply).count();
        assert_eq!((outbox.replies as usize, outbox.backlog()), (replies, kinds.len() - replies));
        // Of which kind they are takes room only where that changes.
        let changes =
            kinds.iter().zip(kinds.iter().skip(1)).filter(|(one, next)| one != next).count();
        let runs = if changes == 0 { 0 } else { changes + 1 };
        assert_eq!(outbox.runs.as_ref().map_or(0, |runs| runs.len()), runs);
    }
}

#[test]
fn a_line_for_everybody_is_stored_once() {
    let mut room = Room::default();
    for id in 0..1000 {
        room.connect(id);
        room.carry_out(id, Request::Name(&format!("p{id}")));
        (0..=id).for_each(|id| deliver(&mut room.delivery, id));
        room.delivery.end_turn();
    }
    room.carry_out(7, Request::Msg("to all of you"));
    let line = b"MSG p7 to all of you\r\n".as_slice();
    assert_eq!(room.delivery.broadcast, line);
    assert_eq!(room.delivery.work, 0);
    assert!(room.delivery.outboxes.iter().all(|(_, outbox)| outbox.bytes.is_empty()));
    assert_eq!(room.delivery.pending(7).unwrap(), [b"", b"", b"".as_slice()]);
    assert_eq!(room.delivery.pending(8).unwrap(), [b"", b"", line]);
}

#[test]
fn joins_and_leaves_are_expected_to_cost_what_they_do_in_rooms_of_any_size() {
    let mut room = Room::default();
    let people = MAX_PUSHED_ROSTER + 2;
    for id in 0..people {
        room.connect(id);
        let name = format!("p{id}");
        let (before, cost) = (room.delivery.caused(), room.cost(id, Request::Name(&name)));
        room.carry_out(id, Request::Name(&name));
        assert_eq!(room.delivery.caused() - before, cost, "{name} joins");
    }
    for id in 0..people {
        let (before, cost) = (room.delivery.caused(), room.cost_of_leaving(id, Reason::Slow));
        room.leave(id, Reason::Slow);
        assert_eq!(room.delivery.caused() - before, cost, "p{id} leaves");
    }
}

#[test]
fn a_turn_ends_when_it_is_long_or_somebody_passes_the_soft_limit() {
    let turn = |put: &mut dyn FnMut(&mut Delivery)| {
        let mut delivery = Delivery::default();
        (0..2).for_each(|id| delivery.outboxes.insert(id, Outbox::default()));
        (0..)
            .take_while(|_| {
                put(&mut delivery);
                !delivery.is_full()
            })
            .count()
            + 1
    };
    let text = "x".repeat(1019);
    assert_eq!(turn(&mut |delivery| delivery.broadcast_to_others(0, &["MSG", &text[1..]])), 64);
    assert_eq!(turn(&mut |delivery| delivery.reply(0, &["PONG"])), 256 * 1024 / 64);
    // One who comes to be over the limit ends a turn, but not with its last byte, and one who is
    // over it already does not.
    let mut delivery = Delivery::default();
    delivery.outboxes.insert(0, Outbox::default());
    (0..128).for_each(|_| delivery.tell(0, &[&"x".repeat(1022)]));
    delivery.end_turn();
    (0..128).for_each(|_| delivery.tell(0, &[&"x".repeat(1022)]));
    assert!(delivery.backlog(0) == SOFT_LIMIT && !delivery.is_full());
    delivery.tell(0, &["x"]);
    assert!(delivery.is_full());
    let mut delivery = Delivery::default();
    delivery.outboxes.insert(0, Outbox::default());
    (0..200).for_each(|_| delivery.tell(0, &[&text]));
    assert!(!delivery.is_full());
    let lines_of_a_turn = [0; 2].map(|_| {
        delivery.settle(0, 0);
        delivery.end_turn();
        let mut lines = 0;
        while !delivery.is_full() {
            delivery.tell(0, &[&text]);
            lines += 1;
        }
        lines
    });
    assert_eq!(lines_of_a_turn, [57, 257]);
}

#[test]
fn requests_wait_from_the_first_byte_of_replies_beyond_the_limit() {
    let mut delivery = Delivery::default();
    delivery.outboxes.insert(0, Outbox::default());
    let is_over = [REPLY_LIMIT, 1].map(|length| {
        delivery.put(0, Kind::Reply, &vec![b'x'; length]);
        delivery.is_over_reply_limit(0)
    });
    assert_eq!(is_over, [false, true]);
}

#[test]
fn a_turn_is_short_behind_a_full_one_and_behind_a_full_read() {
    let mut delivery = Delivery::default();
    let text = "x".repeat(1024 - "MSG \r\n".len());
    let mut lines_behind = |is_full: bool, has_full_read| {
        if !is_full {
            delivery.broadcast.clear();
        }
        delivery.has_full_read = has_full_read;
        delivery.end_turn();
        while !delivery.is_full() {
            delivery.broadcast_to_others(0, &["MSG", &text]);
        }
        delivery.broadcast.len() / 1024
    };
    assert_eq!(lines_behind(false, false), 64);
    assert_eq!(lines_behind(true, false), 4);
    assert_eq!(lines_behind(false, true), 4);
    assert_eq!(lines_behind(false, false), 64);
}

// Flow control

/// One who is over the soft limit, and whoever waits with a request of this cost, from now on.
fn flow_with(now: Instant, waiting: &[(Id, usize)]) -> Flow {
    let mut flow = Flow::new(now);
    flow.set_over_soft_limit(99, true);
    flow.spend(BUDGET, now);
    for &(id, cost) in waiting {
        assert!(!flow.admit(id, cost, now), "the bucket is empty");
    }
    flow
}

#[test]
fn nothing_waits_while_nobody_is_over_the_soft_limit() {
    let now = os::now();
    let mut flow = Flow::new(now);
    flow.spend(10 * BUDGET, now);
    assert!(flow.admit(1, BUDGET, now) && flow.next_time(now).is_none());
    flow.set_over_soft_limit(7, true);
    assert!(flow.admit(1, BUDGET, now), "what went on before costs nothing");
    flow.spend(2 * BUDGET, now);
    assert!(flow.admit(1, 0, now) && !flow.admit(2, 1, now));
    // Who waits goes on as soon as nobody is over the limit.
    flow.set_over_soft_limit(7, false);
    assert_eq!((flow.next_time(now), flow.next(now), flow.next(now)), (Some(now), Some(2), None));
}

#[test]
fn the_bucket_fills_at_the_budget_and_holds_a_second_of_it() {
    let start = os::now();
    let mut flow = flow_with(start, &[(1, BUDGET / 2)]);
    let half = start + Duration::from_millis(500);
    assert_eq!(flow.next_time(start), Some(start + Flow::BATCH_INTERVAL));
    assert_eq!(flow.next(half - Duration::from_millis(1)), None);
    assert_eq!(flow.next(half + Flow::BATCH_INTERVAL), Some(1));
    flow.spend(BUDGET / 2, half);
    // Ten seconds later there is one second of it, not ten.
    let later = half + Duration::from_secs(10);
    assert!(flow.admit(1, BUDGET, later));
    flow.spend(BUDGET, later);
    assert!(!flow.admit(1, 1, later));
}

#[test]
fn who_causes_least_goes_on_first() {
    let now = os::now();
    let later = now + Duration::from_secs(1);
    let mut flow = flow_with(now, &[(1, 3000), (2, 100), (3, 1000)]);
    let order: Vec<_> = std::iter::from_fn(|| flow.next(later)).collect();
    assert_eq!(order, [2, 3, 1]);
    // Who goes on waiting is behind one who is new, and is not passed for ever.
    let mut flow = flow_with(now, &[(1, 1000), (2, 10)]);
    let mut turns = 0;
    while flow.next(later) == Some(2) {
        turns += 1;
        assert!(turns < 1000 && !flow.admit(2, 10, now));
    }
    assert!((99..=101).contains(&turns), "{turns} of 10 bytes went before one of 1000");
}

#[test]
fn whoever_is_new_starts_level_with_those_who_wait() {
    let mut queue = FairQueue::default();
    (1..=2).for_each(|id| queue.push(id, 0));
    let serve = |queue: &mut FairQueue| {
        let id = queue.pop().unwrap();
        queue.charge(id, 1000);
        queue.push(id, 0);
        id
    };
    for _ in 0..20 {
        serve(&mut queue);
    }
    queue.push(3, 0);
    let mut served = [(); 6].map(|()| serve(&mut queue));
    served.sort_unstable();
    assert_eq!(served, [1, 1, 2, 2, 3, 3]);
}

#[test]
fn when_nobody_waits_all_start_level_again() {
    let mut queue = FairQueue::default();
    for _ in 0..2 {
        queue.push(1, 0);
        queue.push(2, 0);
        // Of those who are level, the first place comes first.
        assert_eq!(queue.pop(), Some(1));
        queue.charge(1, 1000);
        assert_eq!(queue.pop(), Some(2));
        queue.charge(2, 0);
    }
}

#[test]
fn who_is_gone_waits_no_more() {
    let now = os::now();
    let mut flow = flow_with(now, &[(1, 10), (2, 20)]);
    flow.forget(1);
    let later = now + Duration::from_secs(1);
    assert_eq!((flow.next(later), flow.next(later)), (Some(2), None));
    flow.forget(99);
    assert!(!flow.applies());
}

// The console

/// What is to be printed, without the times.
fn shown(console: &Console) -> Vec<String> {
    let text = mem::take(&mut console.pending().text);
    text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

#[test]
fn a_console_that_nobody_reads_drops_lines_and_says_how_many() {
    let mut console = Console::new();
    let written = 100_000;
    (0..written).for_each(|number| console.log(format_args!("line {number}")));
    assert!(console.pending().text.len() <= Console::MAX_PENDING + 100);
    let lines = shown(&console);
    assert!(lines.iter().enumerate().all(|(at, line)| *line == format!("line {at}")));
    let dropped = written - lines.len();
    assert!(dropped > 50_000 && lines.len() > 20_000);
    console.log(format_args!("after"));
    console.log(format_args!("further"));
    let note = format!("{dropped} lines dropped: nobody read them");
    assert_eq!(shown(&console), [&note, "after", "further"]);
    assert_eq!(console.pending().all_dropped, dropped as u64);
}

#[test]
fn a_console_is_finished_when_everything_is_printed() {
    let mut console = Console::new();
    let (printer, (near, far)) = (console.clone(), socket_pair());
    std::thread::spawn(move || printer.print(near));
    (0..1000).for_each(|number| console.log(format_args!("line {number}")));
    console.finish(Duration::MAX);
    assert_eq!(console.pending().text, "");
    let printed = io::BufReader::new(far).lines().take(1000);
    assert!(printed.enumerate().all(|(at, it)| it.unwrap().ends_with(&format!(" line {at}"))));
    // Then there is nothing to wait for.
    console.finish(Duration::MAX);
}

#[test]
fn times_are_written_as_rfc_3339_does() {
    let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
    assert_eq!(at(0), "1970-01-01T00:00:00Z");
    assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
    assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
    assert_eq!(at(1_234_567_890), "2009-02-13T23:31:30Z");
    assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
    assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
}

// The command line

fn arguments(line: &str) -> Result<Command, String> {
    parse_arguments(line.split_whitespace().map(str::to_owned))
}

#[test]
fn options_are_understood() {
    let Ok(Command::Run(options)) =
        arguments("--max-clients 5 --max-per-ip=2 --name-timeout 7 --verbose [::1]:80")
    else {
        panic!("refused");
    };
    assert_eq!(options.address.as_deref(), Some("[::1]:80"));
    assert_eq!((options.max_clients, options.max_per_ip), (5, Some(2)));
    assert_eq!((options.name_timeout, options.verbose), (Duration::from_secs(7), true));
    assert!(matches!(arguments("--help"), Ok(Command::Show(text)) if text.contains("--verbose")));
    assert!(matches!(arguments("--version"), Ok(Command::Show(_))));
}

#[test]
fn bad_usage_is_named() {
    for (line, named) in [
        ("--max-clients", "--max-clients"),
        ("--max-clients x", "'x'"),
        ("--max-clients 0", "'0'"),
        ("--max-per-ip=-1", "'-1'"),
        ("--name-timeout 1.5", "'1.5'"),
        ("--verbose=yes", "--verbose=yes"),
        ("--nonsense", "no option --nonsense"),
        ("-x:1", "no option -x:1"),
        ("9999", "'9999'"),
        ("a=b", "'a=b' is not HOST:PORT"),
        ("localhost:http", "'localhost:http'"),
        ("a:1 b:2", "'b:2'"),
    ] {
        let error = arguments(line).expect_err(line);
        assert!(error.contains(named), "{line}: {error}");
    }
}

// The document

#[test]
fn without_an_address_the_server_listens_on_all_of_ipv4_and_where_that_is_served_too_of_ipv6() {
    let addresses = |bindv6only| format!("{:?}", default_addresses(Some(bindv6only)));
    assert_eq!(addresses("0\n"), "[[::]:9999, 0.0.0.0:9999]");
    assert_eq!(addresses("1\n"), "[0.0.0.0:9999]");
}

#[test]
fn whoever_may_not_listen_is_told_why() {
    let denied = explain("[::]:80", ErrorKind::PermissionDenied.into());
    assert!(denied.contains("[::]:80") && denied.contains("below 1024"), "{denied}");
}

#[test]
fn the_document_has_the_same_limits_and_the_sections_that_comments_name() {
    let document = include_str!("../../PROTOCOL.md");
    let kib = |bytes: usize| format!("{} KiB", bytes / 1024);
    let rows = [
        format!("| request | {MAX_REQUEST} bytes |"),
        format!("| server line | {MAX_LINE} bytes |"),
        format!("| name | {MAX_NAME} bytes |"),
        format!("| pushed roster | {MAX_PUSHED_ROSTER} people |"),
        format!("| name time-out | {} s,", NAME_TIMEOUT.as_secs()),
        format!(
            "| closing | {} s in all, or {} s without",
            CLOSE_TIMEOUT.as_secs(),
            CLOSE_STALL_TIMEOUT.as_secs()
        ),
        format!("| the client's end | {} s |", CLOSE_STALL_TIMEOUT.as_secs()),
        format!("| stopping | {} s |", STOP_TIMEOUT.as_secs()),
        format!("| waiting replies | {} |", kib(REPLY_LIMIT)),
        format!("| soft limit | {} |", kib(SOFT_LIMIT)),
        format!("| budget | {} a second, at most {} saved up |", kib(BUDGET), kib(BUDGET)),
        format!("| hard limit | {} MiB |", HARD_LIMIT / 1024 / 1024),
        format!("| stall | {} s |", STALL_TIMEOUT.as_secs()),
    ];
    for row in rows {
        assert!(document.contains(&row), "{row}");
    }
    for line in include_str!("../../server.rs").lines() {
        let section =
            line.split_once("(PROTOCOL.md, \"").and_then(|(_, rest)| rest.split('"').next());
        let heading = format!("## {}\n", section.unwrap_or("Delivery"));
        assert!(document.contains(&heading), "{line}");
    }
}

// The operating system

fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

const NEITHER: Interest = Interest { read: false, write: false };

/// What a poller reports, if it does within a moment: token, readable, writable, failed.
fn reported(poller: &mut system::Poller) -> Vec<(usize, bool, bool, bool)> {
    let (mut ready, begun, moment) = (Vec::new(), Instant::now(), Duration::from_millis(20));
    // What is sent has arrived, as far as there is something to wait for.
    poller.wait(&mut ready, Some(moment)).unwrap();
    assert!(!ready.is_empty() || begun.elapsed() >= moment, "it has waited");
    ready.iter().map(|it| (it.token, it.readable, it.writable, it.failed)).collect()
}

#[test]
fn the_poller_reports_what_it_was_asked_for_until_it_is_dealt_with() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, mut far) = socket_pair();
    poller.add(&near, 7, Interest { read: true, write: false }).unwrap();
    assert_eq!(reported(&mut poller), []);
    far.write_all(b"x").unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    poller.modify(&near, 7, Interest { read: true, write: true }).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, true, false)]);
    near.read_exact(&mut [0]).unwrap();
    assert_eq!(reported(&mut poller), [(7, false, true, false)]);
    poller.modify(&near, 7, NEITHER).unwrap();
    far.write_all(b"x").unwrap();
    assert_eq!(reported(&mut poller), []);
    poller.delete(&near, 7).unwrap();
    drop(far);
    assert_eq!(reported(&mut poller), []);
}

#[test]
#[cfg(target_os = "linux")]
fn the_poller_reports_failures_to_whoever_asks_for_nothing() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, far) = socket_pair();
    poller.add(&near, 7, NEITHER).unwrap();
    // A peer that closes with something unread resets the connection.
    near.write_all(b"x").unwrap();
    drop(far);
    assert_eq!(reported(&mut poller), [(7, true, true, true)]);
    poller.delete(&near, 7).unwrap();
    // The peer's end is no failure; where both sides have ended, nothing is left to be done.
    let (near, far) = socket_pair();
    poller.add(&near, 8, READ).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reported(&mut poller), [(8, true, false, false)]);
    near.shutdown(Shutdown::Write).unwrap();
    let is_epoll = cfg!(not(linechat_poll));
    assert_eq!(reported(&mut poller), [(8, true, is_epoll, is_epoll)]);
    poller.delete(&near, 8).unwrap();
    // A failure without a hang-up: a pipe that nobody can read any more.
    let mut child =
        std::process::Command::new("true").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let pipe = child.stdin.take().unwrap();
    child.wait().unwrap();
    poller.add(&pipe, 9, NEITHER).unwrap();
    assert_eq!(reported(&mut poller), [(9, true, true, true)]);
}

#[test]
#[cfg(linechat_poll)]
fn a_hang_up_is_for_who_reads_and_otherwise_rests() {
    // A pipe that nobody can write to any more hangs up, and is not readable (poll(2)).
    let mut child =
        std::process::Command::new("true").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    child.wait().unwrap();
    let mut poller = system::Poller::new().unwrap();
    poller.add(&pipe, 7, READ).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    poller.modify(&pipe, 7, NEITHER).unwrap();
    let mut ready = Vec::new();
    poller.wait(&mut ready, None).unwrap();
    assert_eq!(ready, []);
    // The system would report it again at once.
    assert_eq!(reported(&mut poller), []);
    poller.modify(&pipe, 7, READ).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
}

#[test]
fn only_an_interruption_is_no_failure_to_wait() {
    let waited = |kind: ErrorKind| system::unless_interrupted(Err(kind.into())).ok();
    assert_eq!(waited(ErrorKind::Interrupted), Some(0));
    assert_eq!(waited(ErrorKind::InvalidInput), None);
}

#[test]
fn without_a_time_out_the_poller_waits_until_there_is_something() {
    let mut poller = system::Poller::new().unwrap();
    let (near, mut far) = socket_pair();
    poller.add(&near, 7, READ).unwrap();
    let waiting = std::thread::spawn(move || {
        let mut ready = Vec::new();
        poller.wait(&mut ready, None).unwrap();
        ready.len()
    });
    // Another poller lets some time pass.
    assert_eq!(reported(&mut system::Poller::new().unwrap()), []);
    far.write_all(b"x").unwrap();
    assert_eq!(waiting.join().unwrap(), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn what_a_peer_does_not_read_waits_here_and_not_in_the_kernel() {
    let (mut near, far) = socket_pair();
    system::prepare(&near);
    near.set_nonblocking(true).unwrap();
    let mut taken = 0;
    while let Ok(length) = near.write(&[0; 16 * 1024]) {
        taken += length;
    }
    let received = far.peek(&mut vec![0; taken]).unwrap();
    let kept = (taken - received) / 1024;
    assert!((128..=256).contains(&kept), "the kernel keeps {kept} KiB");
}

#[test]
#[cfg(target_os = "linux")]
fn many_can_wait_to_be_accepted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    system::set_accept_queue(&listener);
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let most: usize = most.trim().parse().unwrap();
    // Whoever finds no place tries for minutes; nobody who does waits.
    let (address, stuck) = (listener.local_addr().unwrap(), Duration::from_secs(10));
    for _ in 0..most.min(200) {
        TcpStream::connect_timeout(&address, stuck).expect("a place in the queue");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
    // The limit is the process's, so this happens in another one, which runs this test alone.
    let is_limited = "LINECHAT_LIMITED";
    if std::env::var_os(is_limited).is_none() {
        let test = "tests::the_soft_limit_on_open_files_is_raised_to_the_hard_one";
        let script = format!("ulimit -S -n 64; exec \"$0\" --exact {test}");
        let mut shell = std::process::Command::new("sh");
        shell.arg("-c").arg(script).arg(std::env::current_exe().unwrap()).env(is_limited, "1");
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{}", output.stdout.escape_ascii());
        return;
    }
    let raised = system::raise_descriptor_limit().to_string();
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files ")).unwrap();
    let [soft, hard] = [0, 1].map(|at| line.split_whitespace().nth(at).unwrap());
    assert_eq!((&*raised, soft), (hard, hard));
}

#[test]
#[cfg(target_os = "linux")]
fn only_a_lack_of_descriptors_is_one() {
    // EMFILE, ENFILE, and ENOMEM, which ends nobody's connection (accept(2)).
    let is_one = |code| system::is_out_of_descriptors(&io::Error::from_raw_os_error(code));
    assert_eq!([24, 23, 12].map(is_one), [true, true, false]);
}
