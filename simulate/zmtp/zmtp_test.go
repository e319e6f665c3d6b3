// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/leaktest"
)

// TestMain fails the package when goroutines outlive its tests.
func TestMain(m *testing.M) { os.Exit(leaktest.Run(m)) }

// patience is how long a machine that stalls may take for what takes an idle one no time.
const patience = time.Minute

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func newPub(t *testing.T, hwm int) *Pub {
	t.Helper()
	p := NewPub(listen(t), hwm)
	t.Cleanup(p.Close)
	return p
}

// newEcho is a router that answers each request with itself.
func newEcho(t *testing.T) *Router {
	t.Helper()
	r := NewRouter(listen(t), func(request [][]byte, reply Reply) { _ = reply(request...) })
	t.Cleanup(r.Close)
	return r
}

// peer is a client that says and reads bytes.
type peer struct {
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, s *server) *peer {
	t.Helper()
	c, err := net.Dial("tcp", s.ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &peer{c, bufio.NewReader(c)}
}

// The opening of a ZMTP 3.1 peer with the NULL mechanism: libzmq's.
const (
	greeting = "\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01NULL\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	readySub    = "\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
	readyDealer = "\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
)

// join shakes hands and says more.
func join(t *testing.T, s *server, ready, more string) *peer {
	t.Helper()
	p := dial(t, s)
	p.say(t, greeting+ready+more)
	head := make([]byte, greetingBytes)
	if _, err := io.ReadFull(p.r, head); err != nil || head[10] != 3 || string(head[12:16]) != "NULL" {
		t.Fatalf("greeting % x, %v", head, err)
	}
	if flags, body := p.frame(t); flags != flagCommand || socketType(body) != s.own {
		t.Fatalf("READY: %x %q", flags, body)
	}
	return p
}

func (p *peer) say(t *testing.T, s string) {
	t.Helper()
	if _, err := io.WriteString(p, s); err != nil {
		t.Fatal(err)
	}
}

func (p *peer) frame(t *testing.T) (flags byte, body []byte) {
	t.Helper()
	head := make([]byte, 2)
	if _, err := io.ReadFull(p.r, head); err != nil {
		t.Fatal(err)
	}
	n := uint64(head[1])
	if head[0]&flagLong != 0 {
		rest := make([]byte, 7)
		if _, err := io.ReadFull(p.r, rest); err != nil {
			t.Fatal(err)
		}
		n = binary.BigEndian.Uint64(append(head[1:], rest...))
	}
	body = make([]byte, n)
	if _, err := io.ReadFull(p.r, body); err != nil {
		t.Fatal(err)
	}
	return head[0], body
}

// message reads one message as texts.
func (p *peer) message(t *testing.T) (out []string) {
	t.Helper()
	for {
		flags, body := p.frame(t)
		if out = append(out, string(body)); flags&flagMore == 0 {
			return out
		}
	}
}

// ended reads until the other side hangs up.
func (p *peer) ended(t *testing.T) {
	t.Helper()
	if _, err := io.Copy(io.Discard, p.r); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("not hung up on: %v", err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(time.Millisecond)
	}
}

const subscribeA = "\x00\x02\x01a"

func TestPubSendsWhatIsSubscribedTo(t *testing.T) {
	pub := newPub(t, 10)
	p := join(t, &pub.server, readySub, "\x00\x02\x01a\x00\x03\x01bb\x00\x02\x01a\x00\x02\x00a")
	eventually(t, "two topics", func() bool { return pub.Topics() == 2 }) // a was subscribed to twice and given up once
	for _, topic := range []string{"", "b", "a1", "c", "bb2"} {
		pub.Send([]byte(topic), []byte(strings.Repeat("x", 300)))
	}
	for _, want := range []string{"a1", "bb2"} {
		if got := p.message(t); len(got) != 2 || got[0] != want || len(got[1]) != 300 {
			t.Errorf("got %q, want %s", got, want)
		}
	}
	if pub.Dropped() != 0 {
		t.Errorf("%d dropped", pub.Dropped())
	}
}

func TestPubSubscriberComesAndGoes(t *testing.T) {
	pub := newPub(t, 10)
	for i := range 5 {
		p := join(t, &pub.server, readySub, subscribeA)
		eventually(t, "subscribed", func() bool { return pub.Topics() == 1 })
		pub.Send(fmt.Append(nil, "a", i))
		if got := p.message(t); got[0] != fmt.Sprint("a", i) {
			t.Errorf("got %q", got)
		}
		p.Close()
		eventually(t, "gone", func() bool { return pub.Topics() == 0 })
		pub.Send([]byte("a to nobody"))
	}
}

// One that does not read loses messages; the others and the sender do not notice.
func TestPubSlowSubscriber(t *testing.T) {
	pub := newPub(t, 4)
	join(t, &pub.server, readySub, subscribeA)
	quick := join(t, &pub.server, readySub, subscribeA)
	eventually(t, "subscribed", func() bool { return pub.Topics() == 2 })
	big := bytes.Repeat([]byte("x"), 1<<20)
	for i := range 40 {
		pub.Send(fmt.Append(nil, "a", i), big)
		if got := quick.message(t); got[0] != fmt.Sprint("a", i) {
			t.Fatalf("message %d: %s", i, got[0])
		}
	}
	if n := pub.Dropped(); n == 0 || n > 36 {
		t.Errorf("%d dropped", n)
	}
}

func TestRouterAnswersEachPeer(t *testing.T) {
	r := newEcho(t)
	a, b := join(t, &r.server, readyDealer, ""), join(t, &r.server, readyDealer, "")
	for _, p := range []struct {
		*peer
		text string
	}{{a, "1"}, {b, "2"}, {a, "3"}} {
		p.say(t, "\x01\x00\x00\x01"+p.text)
		if got := p.message(t); len(got) != 2 || got[0] != "" || got[1] != p.text {
			t.Errorf("got %q, want an empty frame and %s", got, p.text)
		}
	}
}

func TestPingIsAnswered(t *testing.T) {
	r := newEcho(t)
	p := join(t, &r.server, readyDealer, "\x04\x09\x04PING\x00\x0ahi\x00\x02me")
	if flags, body := p.frame(t); flags != flagCommand || string(body) != "\x04PONGhi" {
		t.Errorf("%x %q", flags, body)
	}
	if got := p.message(t); got[0] != "me" {
		t.Errorf("after it: %q", got)
	}
}

func TestHostilePeersAreHungUpOn(t *testing.T) {
	tests := []struct{ name, said string }{
		{"HTTP", "GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: something that is as long as a greeting\r\n\r\n"},
		{"ZMTP 2", strings.Replace(greeting, "\x03\x01NULL", "\x02\x01NULL", 1) + readySub},
		{"another mechanism", strings.Replace(greeting, "NULL\x00\x00\x00\x00", "CURVE\x00\x00\x00", 1) + readySub},
		{"a socket that does not go with it", greeting + readyDealer},
		{"no READY", greeting + "\x00\x01x"},
		{"a READY that ends early", greeting + "\x04\x08\x05READY\xff\xff"},
		{"a property longer than its command", greeting + strings.Replace(readySub, "\x00\x00\x00\x03", "\xff\xff\xff\xff", 1)},
		{"a frame of 2^63-1 bytes", greeting + readySub + "\x02\x7f\xff\xff\xff\xff\xff\xff\xff"},
		{"a frame of 2^64-1 bytes", greeting + readySub + "\x02\xff\xff\xff\xff\xff\xff\xff\xff"},
		{"a frame above the limit", greeting + readySub + "\x02\x00\x00\x00\x00\x00\x01\x00\x01"},
		{"unknown flags", greeting + readySub + "\x80\x01x"},
		{"a message without end", greeting + readySub + strings.Repeat("\x01\x01x", maxFrames+1)},
		{"too many topics", greeting + readySub + manyTopics()},
		{"a long topic", greeting + readySub + "\x02\x00\x00\x00\x00\x00\x00\x04\x02\x01" + strings.Repeat("t", maxTopic+1)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pub := newPub(t, 10)
			p := dial(t, &pub.server)
			_, _ = io.WriteString(p, tt.said) // it may be hung up on before its end
			p.ended(t)
			eventually(t, "forgotten", func() bool { return pub.Topics() == 0 })
			// Nobody else suffers.
			join(t, &pub.server, readySub, subscribeA)
			eventually(t, "subscribed", func() bool { return pub.Topics() == 1 })
		})
	}
}

func manyTopics() string {
	var b strings.Builder
	for i := range maxTopics + 1 {
		fmt.Fprintf(&b, "\x00\x05\x01%04d", i)
	}
	return b.String()
}

// Who says nothing in time is hung up on.
func TestSilentPeer(t *testing.T) {
	pub := newPubOf(listen(t), 10, 20*time.Millisecond)
	t.Cleanup(pub.Close)
	dial(t, &pub.server).ended(t)
}

// Until then silent peers keep nobody out, but when they have every place.
func TestSilentPeers(t *testing.T) {
	pub := newPubOf(listen(t), 10, time.Hour)
	t.Cleanup(pub.Close)
	silent := make([]*peer, 0, maxPeers)
	for range maxPeers - 1 {
		silent = append(silent, dial(t, &pub.server))
	}
	eventually(t, "all are there", func() bool {
		pub.mu.Lock()
		defer pub.mu.Unlock()
		return len(pub.conns) == maxPeers-1
	})
	join(t, &pub.server, readySub, subscribeA)
	eventually(t, "subscribed", func() bool { return pub.Topics() == 1 })
	dial(t, &pub.server).ended(t) // one too many
	silent[0].Close()
	eventually(t, "one left", func() bool {
		pub.mu.Lock()
		defer pub.mu.Unlock()
		return len(pub.conns) == maxPeers-1
	})
	join(t, &pub.server, readySub, "")
}

// Close ends what is in any state: silent, joined, with a full queue, and in the middle of an answer.
func TestCloseEndsEverything(t *testing.T) {
	pub := NewPub(listen(t), 100)
	dial(t, &pub.server)
	stuck := join(t, &pub.server, readySub, subscribeA)
	eventually(t, "subscribed", func() bool { return pub.Topics() == 1 })
	for range 50 {
		pub.Send([]byte("a"), bytes.Repeat([]byte("x"), 1<<20))
	}
	answering := make(chan struct{}, 1)
	r := NewRouter(listen(t), func(_ [][]byte, reply Reply) {
		answering <- struct{}{}
		for reply(bytes.Repeat([]byte("x"), 1<<20)) == nil { // until the peer is gone
		}
	})
	join(t, &r.server, readyDealer, "\x00\x01x")
	<-answering
	for range 2 {
		pub.Close()
		r.Close()
	}
	pub.Send([]byte("a to nobody"))
	stuck.ended(t)
	if c, err := net.Dial("tcp", pub.ln.Addr().String()); err == nil {
		c.Close()
		t.Error("the port is open")
	}
}

// FuzzPeer says anything to a publisher; nothing may bring it down.
func FuzzPeer(f *testing.F) {
	f.Add([]byte(greeting + readySub + subscribeA))
	f.Add([]byte(greeting + readyDealer + "\x01\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, said []byte) {
		ours, theirs := net.Pipe()
		var talk sync.WaitGroup
		defer talk.Wait()
		defer ours.Close()
		talk.Go(func() {
			_, _ = theirs.Write(said)
			theirs.Close()
		})
		talk.Go(func() { _, _ = io.Copy(io.Discard, theirs) })
		c, err := open(ours, "PUB", []string{"SUB"}, handshakeWait)
		for s := (&subscriber{topics: map[string]int{}, wake: make(chan struct{}, 1)}); err == nil; {
			var frames [][]byte
			if frames, err = c.receive(); err == nil && !s.subscribe(frames) {
				break
			}
		}
	})
}
