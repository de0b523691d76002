//! Tests of what is inside linechat-client: what a line means, the keys, the line being typed, the
//! texts, and when patience ends. What a person sees of it is in the transcripts.

use super::*;
use std::sync::mpsc::channel;

fn words(arguments: &str) -> Result<Command, String> {
    parse_arguments(arguments.split_whitespace().map(str::to_owned), Language::English)
}

/// A client that has been greeted, with what it writes to the server.
fn greeted(name: Option<&str>, screen: Screen) -> (Client, Receiver<String>) {
    let (mut client, sent) = connected(name, screen);
    assert_eq!(client.arrived("HELLO linechat/1 hi"), Ok(()));
    (client, sent)
}

fn connected(name: Option<&str>, screen: Screen) -> (Client, Receiver<String>) {
    let options = Options {
        host: String::new(),
        name: name.map(str::to_owned),
        language: Language::English,
        has_colours: false,
        rings: true,
    };
    let (out, sent) = channel();
    (Client::new("host:9999".to_owned(), options, screen, out), sent)
}

fn plain() -> Screen {
    Screen { input: None, has_colours: false, pending: String::new() }
}

// What a typed line means

#[test]
fn lines_mean_what_people_expect() {
    let say = |text: &str| Typed::Request(Request::Say(text.to_owned()));
    let whisper = |to: &str, text: &str| {
        Typed::Request(Request::Whisper { to: to.to_owned(), text: text.to_owned() })
    };
    assert_eq!(understand(""), Typed::Nothing);
    assert_eq!(understand("  "), Typed::Nothing);
    assert_eq!(understand(" hello "), say(" hello "));
    assert_eq!(understand("//list"), say("/list"));
    assert_eq!(understand("@bob  hi"), whisper("bob", " hi"));
    assert_eq!(understand("/bob hi"), whisper("bob", "hi"));
    assert_eq!(understand("@list hi"), whisper("list", "hi"));
    for list in ["/list", "/clientes", "/LIST "] {
        assert_eq!(understand(list), Typed::Request(Request::List));
    }
    assert_eq!(understand("/quit"), Typed::Quit);
    assert_eq!(understand("/sair"), Typed::Quit);
    assert_eq!(understand("/help"), Typed::Help);
    for mistake in ["@", "@bob", "@bob ", "/", "/bob"] {
        let line = mistake.trim_end().to_owned();
        assert_eq!(understand(mistake), Typed::Mistake(text::NOTHING_SAID, line));
    }
    assert_eq!(understand("/quit now"), Typed::Mistake(text::TAKES_NOTHING, "quit".to_owned()));
}

#[test]
fn a_request_fits_into_a_line_or_is_not_sent() {
    let longest = "x".repeat(MAX_REQUEST - "MSG ".len());
    assert_eq!(understand(&longest), Typed::Request(Request::Say(longest.clone())));
    let excess = Typed::Mistake(text::TOO_LONG, "1".to_owned());
    assert_eq!(understand(&(longest + "x")), excess);
}

// The keys

fn keys(bytes: &[u8]) -> Vec<Key> {
    let mut keys = Keys::default();
    keys.add(bytes);
    std::iter::from_fn(|| keys.next()).collect()
}

#[test]
fn keys_are_found_however_they_are_cut() {
    let typed =
        "aé日👍\r\n\t\x7f\x1b[A\x1bOB\x1b[3~\x1b[1;5C\x1bq\x1b[200~b\x1b[201~\x03".as_bytes();
    let whole = keys(typed);
    use Key::*;
    let expected = [
        Character('a'),
        Character('é'),
        Character('日'),
        Character('👍'),
        Enter,
        Enter,
        Tab,
        Backspace,
        Up,
        Down,
        Delete,
        Unknown,
        Unknown,
        PasteBegins,
        Character('b'),
        PasteEnds,
        Interrupt,
    ];
    assert_eq!(whole, expected);
    let mut one_by_one = Keys::default();
    let mut found = Vec::new();
    for byte in typed {
        one_by_one.add(&[*byte]);
        found.extend(std::iter::from_fn(|| one_by_one.next()));
    }
    assert_eq!(found, expected);
}

#[test]
fn bytes_without_meaning_hold_nothing_up() {
    assert_eq!(keys(b"\xffa"), [Key::Unknown, Key::Character('a')]);
    assert_eq!(keys(b"\xe6\x97a"), [Key::Unknown, Key::Character('a')]);
    assert_eq!(keys(b"\xf0\x9f\x91"), []);
    let endless = [b"\x1b[".to_vec(), b"1".repeat(40)].concat();
    assert_eq!(keys(&endless), [Key::Unknown]);
}

// The line being typed

/// The line that these keys make, with `|` for the cursor.
fn line_of(editor: &Editor) -> String {
    let (before, after) = editor.line.split_at(editor.cursor);
    format!("{before}|{after}")
}

fn typed(bytes: &str) -> Editor {
    let mut editor = Editor::default();
    press(&mut editor, bytes, &[]);
    editor
}

fn press(editor: &mut Editor, bytes: &str, names: &[&str]) {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    for key in keys(bytes.as_bytes()) {
        if let Pressed::Entered(line) = editor.press(key, &names) {
            editor.remember(&line);
        }
    }
}

#[test]
fn the_line_is_edited_as_in_a_shell() {
    for (keys, expected) in [
        ("hello", "hello|"),
        ("hello\x01", "|hello"),
        ("hello\x01\x05", "hello|"),
        ("hello\x1b[D\x1b[Dy", "hely|lo"),
        ("hello\x1b[D\x1b[C\x1b[C!", "hello!|"),
        ("hello\x1b[D\x7f", "hel|o"),
        ("\x7fhello\x01\x7f\x1b[3~", "|ello"),
        ("hello\x1b[3~\x04", "hello|"),
        ("hello\x02\x04", "hell|"),
        ("hello world\x01\x06\x06\x0b", "he|"),
        ("hello world\x02\x15", "|d"),
        ("one two  \x17", "one |"),
        ("one\u{3000}two\x17\x17\x17", "|"),
        ("mãe\x1b[D\x7f", "m|e"),
        ("日本\x02\x02語", "語|日本"),
        // An accent, a skin tone and a family of emoji go with what they belong to.
        ("ae\u{301}\x7f", "a|"),
        ("a👍🏽\x1b[D", "a|👍🏽"),
        ("👩\u{200d}👧\x02", "|👩\u{200d}👧"),
        ("a\u{1b}[200~\t\u{1b}[201~b", "a\tb|"),
        ("a\u{202e}\u{85}b", "ab|"),
    ] {
        assert_eq!(line_of(&typed(keys)), expected, "{keys:?}");
    }
}

#[test]
fn what_was_sent_comes_back_with_the_arrows() {
    let mut editor = typed("one\rtwo\rtwo\rdraft");
    for (keys, expected) in [
        ("\x1b[B", "draft|"),
        ("\x1b[A", "two|"),
        ("\x10", "one|"),
        ("\x1b[A", "one|"),
        ("!\x1b[B", "two|"),
        ("\x0e", "draft|"),
    ] {
        press(&mut editor, keys, &[]);
        assert_eq!(line_of(&editor), expected, "{keys:?}");
    }
}

#[test]
fn names_are_completed_in_turn() {
    let names = ["bob", "Bert", "ana"];
    for (keys, expected) in [
        ("@b\t", "@bob |"),
        ("@b\t\t", "@Bert |"),
        ("@b\t\t\t", "@bob |"),
        ("/BE\t", "/Bert |"),
        ("@\t\t\t", "@ana |"),
        ("@x\t", "@x|"),
        ("b\t", "b|"),
        ("@bob an\t", "@bob an|"),
        ("hi\x01@b\t", "@bob |hi"),
        ("@b\t \t", "@bob  |"),
        ("@bob\x01\t", "|@bob"),
        ("\t", "|"),
    ] {
        let mut editor = Editor::default();
        press(&mut editor, keys, &names);
        assert_eq!(line_of(&editor), expected, "{keys:?}");
    }
}

#[test]
fn a_long_line_is_shown_around_the_cursor() {
    let shown = |keys: &str, columns| {
        let (before, after) = typed(keys).view(columns);
        assert!(width_of(&before) + width_of(&after) <= columns, "{before}|{after}");
        format!("{before}|{after}")
    };
    assert_eq!(shown("0123456789", 10), "0123456789|");
    assert_eq!(shown("0123456789a", 10), "56789a|");
    assert_eq!(shown("0123456789abcde", 10), "56789abcde|");
    assert_eq!(shown("0123456789abcdef", 10), "abcdef|");
    assert_eq!(shown("0123456789abcdef\x02\x02", 10), "56789abcd|e");
    assert_eq!(shown("0123456789a\x01", 10), "|0123456789");
    assert_eq!(shown("日本語日本語", 5), "語|");
    assert_eq!(shown("日本語日本語\x01", 5), "|日本");
    assert_eq!(shown("ab", 1), "b|");
    assert_eq!(shown("abc", 0), "|");
}

#[test]
fn characters_are_as_wide_as_terminals_make_them() {
    for (text, columns) in [
        ("abc", 3),
        ("mãe", 3),
        ("e\u{301}", 1),
        ("日本語", 6),
        ("ｱ", 1),
        ("한", 2),
        ("👍", 2),
        ("…", 1),
    ] {
        assert_eq!(width_of(text), columns, "{text}");
    }
}

// The texts

#[test]
fn both_languages_say_the_same() {
    for text in [
        text::MESSAGE,
        text::PRIVATE,
        text::PRIVATE_TO,
        text::USERS,
        text::NOTHING_SAID,
        text::TAKES_NOTHING,
        text::CANNOT_CONNECT,
        text::LOST,
        text::CLOSED_BY,
        text::NAME_REFUSED,
        text::TOO_LONG,
        text::USAGE,
    ] {
        let [english, portuguese] = text;
        assert_eq!(english.matches("{}").count(), portuguese.matches("{}").count(), "{text:?}");
    }
    assert_eq!(Language::Portuguese.say(text::JOINED, &["a{}b"]), "a{}b entrou no chat.");
}

#[test]
fn the_first_variable_that_is_set_is_the_locale() {
    let language = |all: &str, messages: &str, lang: &str| {
        Language::of_the_locale(|variable| match variable {
            "LC_ALL" => Some(all.to_owned()),
            "LC_MESSAGES" => Some(messages.to_owned()),
            _ => Some(lang.to_owned()),
        })
    };
    assert_eq!(language("", "", "pt_BR.UTF-8"), Language::Portuguese);
    assert_eq!(language("", "pt", "en_US.UTF-8"), Language::Portuguese);
    assert_eq!(language("C", "pt", "pt"), Language::English);
    assert_eq!(Language::of_the_locale(|_| None), Language::English);
}

#[test]
fn nothing_unprintable_is_shown() {
    assert_eq!(printable("tab\tmãe 👍".as_bytes()), "tab\tmãe 👍");
    assert_eq!(printable(b"\x1b[2J\x07\xff"), "\\u{1b}[2J\\u{7}\u{fffd}");
    assert_eq!(printable("\u{9b}\u{2028}\u{202e}\u{2066}".as_bytes()), {
        "\\u{9b}\\u{2028}\\u{202e}\\u{2066}"
    });
}

#[test]
fn names_have_colours_of_their_own_and_private_messages_stand_apart() {
    let coloured = Screen { has_colours: true, ..plain() };
    assert_eq!(coloured.name("ana"), coloured.name("ana"));
    let code = |name| coloured.name(name).split('m').next().map(str::to_owned);
    assert_eq!(code("ana"), code("Ana"));
    assert_ne!(code("ana"), code("bob"));
    assert!(coloured.name("ana").ends_with("mana\x1b[0m"));
    assert_eq!(plain().name("ana"), "ana");
    let (mut client, _sent) = greeted(Some("ana"), coloured);
    client.arrived("WELCOME ana 2").unwrap();
    client.arrived("PRIV bob psst").unwrap();
    client.arrived("LEFT bob 1 quit").unwrap();
    client.arrived("ERR bad-text no").unwrap();
    assert!(client.screen.pending.contains("\x1b[1m[private] bob: psst\x1b[0m\n"));
    assert!(client.screen.pending.contains("\x1b[2mbob left the chat.\x1b[0m\n"));
    assert!(client.screen.pending.contains("\x1b[31mError: "));
}

#[test]
fn the_bell_rings_for_a_private_message_and_for_ones_name() {
    let rings = |line: &str| {
        let (mut client, _sent) = greeted(Some("ana"), plain());
        client.arrived("WELCOME ana 2").unwrap();
        client.arrived(line).unwrap();
        client.screen.pending.contains('\x07')
    };
    assert!(rings("PRIV bob hi"));
    assert!(rings("MSG bob hi Ana, there?"));
    assert!(!rings("MSG bob hi anabel and banana"));
    assert!(!rings("MSG ana.b hello"));
    assert!(!rings("JOINED ana2 3"));
}

// The conversation

#[test]
fn the_server_is_asked_for_a_sign_of_life_and_given_up_without_one() {
    let (mut client, sent) = greeted(Some("ana"), plain());
    client.arrived("WELCOME ana 1").unwrap();
    sent.try_iter().for_each(drop);
    assert_eq!(client.deadline(), client.quiet_since + SILENCE);
    client.grow_impatient().unwrap();
    assert_eq!(sent.try_recv().unwrap(), "PING 1\n");
    assert_eq!(client.deadline(), client.quiet_since + SILENCE + PATIENCE);
    client.happened(Event::Arrived("PONG 1".to_owned())).unwrap();
    assert_eq!(client.deadline(), client.quiet_since + SILENCE);
    client.grow_impatient().unwrap();
    let lost = "lost the server at host:9999: it fell silent".to_owned();
    assert_eq!(client.grow_impatient(), Err(End::Failed(lost)));
}

#[test]
fn a_server_that_does_not_say_bye_is_not_awaited_for_ever() {
    let (mut client, _sent) = greeted(None, plain());
    client.quiet_since -= 2 * SILENCE;
    client.typed(b"").unwrap();
    client.send_waiting();
    assert!(client.deadline() > Instant::now());
    assert!(client.grow_impatient().is_err());
}

#[test]
fn what_was_not_sent_is_known() {
    let (mut client, sent) = greeted(Some("ana"), plain());
    for line in ["one", "@bob two", "/list", "three"] {
        client.entered(line).unwrap();
    }
    assert_eq!(client.unsent(&End::Left).len(), 3);
    client.arrived("WELCOME ana 1").unwrap();
    client.send_waiting();
    assert_eq!(sent.try_iter().last().unwrap(), "MSG three\nPING 4\n");
    client.arrived("PONG 1").unwrap();
    client.arrived("ERR no-such-user x").unwrap();
    client.entered("four").unwrap();
    let end = End::Failed(String::new());
    let unsent = client.unsent(&end);
    assert_eq!(unsent, ["perhaps not sent: three", "not sent: four"]);
}

#[test]
fn what_is_typed_before_the_server_greets_is_the_name_and_then_messages() {
    let (mut client, sent) = connected(None, plain());
    client.entered("ana").unwrap();
    client.entered("hello").unwrap();
    client.arrived("HELLO linechat/1 hi").unwrap();
    client.send_waiting();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["NAME ana\n"]);
    client.arrived("WELCOME ana 1").unwrap();
    client.send_waiting();
    assert_eq!(sent.try_iter().collect::<Vec<_>>(), ["MSG hello\nPING 1\n"]);
}

#[test]
fn no_more_requests_are_under_way_than_the_server_confirms() {
    let (mut client, sent) = greeted(Some("ana"), plain());
    client.arrived("WELCOME ana 1").unwrap();
    (0..2 * MAX_UNCONFIRMED).for_each(|_| client.entered("hi").unwrap());
    client.send_waiting();
    assert_eq!(sent.try_iter().count(), 1 + MAX_UNCONFIRMED);
    assert!(!client.can_take_more());
    client.arrived("PONG 2").unwrap();
    client.send_waiting();
    assert_eq!(sent.try_iter().count(), 2);
}

#[test]
fn the_roster_is_kept_current() {
    let (mut client, _sent) = greeted(Some("ana"), plain());
    client.arrived("WELCOME ana 3").unwrap();
    client.arrived("USERS 3 zoe bob").unwrap();
    client.arrived("USERS 3 ana").unwrap();
    client.arrived("JOINED eve 4").unwrap();
    client.arrived("LEFT bob 3 quit").unwrap();
    assert_eq!(client.roster, ["zoe", "ana", "eve"]);
    assert!(client.screen.pending.contains("Users online (3): zoe, bob, ana\n"));
    client.arrived("USERS 2 ana eve").unwrap();
    assert_eq!(client.roster, ["ana", "eve"]);
}

#[test]
fn a_line_far_too_long_is_one_line() {
    let long = "x".repeat(5 * MAX_LINE as usize);
    let full = "y".repeat(2 * MAX_LINE as usize - 1);
    let mut input = io::Cursor::new(format!("one\n{long}\n{full}\ntwo\nlast"));
    let mut lines = std::iter::from_fn(|| Some(read_line(&mut input).unwrap()));
    assert_eq!(lines.next().unwrap(), b"one\n");
    assert!(lines.next().unwrap().len() > MAX_REQUEST);
    assert_eq!(lines.next().unwrap(), format!("{full}\n").into_bytes());
    assert_eq!(lines.next().unwrap(), b"two\n");
    assert_eq!(lines.next().unwrap(), b"last");
    assert_eq!(lines.next().unwrap(), b"");
}

// The command line

#[test]
fn addresses_get_the_default_port() {
    for (host, expected) in [
        ("localhost", "localhost:9999"),
        ("localhost:1", "localhost:1"),
        ("::1", "[::1]:9999"),
        ("[::1]", "[::1]:9999"),
        ("[::1]:1", "[::1]:1"),
    ] {
        assert_eq!(with_port(host), expected);
    }
}

#[test]
fn options_stand_anywhere() {
    let options = Options {
        host: "host".to_owned(),
        name: Some("ana".to_owned()),
        language: Language::Portuguese,
        has_colours: false,
        rings: true,
    };
    let expected = Ok(Command::Run(options));
    assert_eq!(words("--bell host --lang pt ana --no-color"), expected);
    assert_eq!(words("--lang=pt --no-color host ana --bell"), expected);
    assert!(
        matches!(words("--lang=pt --help"), Ok(Command::Show(text)) if text.starts_with("Uso"))
    );
    assert!(words("--lang fr").is_err_and(|text| text.contains("'fr'")));
    assert!(words("--lang").is_err());
    assert!(words("--colour").is_err_and(|text| text.contains("--colour")));
    assert!(words("host ana bob").is_err_and(|text| text.contains("'bob'")));
}

#[test]
fn every_address_of_a_name_is_tried() {
    // localhost is ::1 too, on most machines, and nothing listens there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(connect(&format!("localhost:{port}"), Language::English).is_ok());
    let invalid = connect("localhost:99999", Language::English);
    assert_eq!(invalid.unwrap_err(), "invalid port value");
}
