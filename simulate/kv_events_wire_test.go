// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-zeromq/zmq4"
)

// kvMessage is one message as a subscriber gets it.
type kvMessage struct {
	topic        string
	seq, payload []byte
}

func (m kvMessage) number() int { return int(binary.BigEndian.Uint64(m.seq)) }

// kvSubscriber is a SUB socket of another implementation.
type kvSubscriber struct{ messages chan kvMessage }

// subscribe returns once the engine knows of the subscription.
func subscribe(t *testing.T, e *Engine, rank int, topic string) *kvSubscriber {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	socket := zmq4.NewSub(ctx)
	s := &kvSubscriber{make(chan kvMessage, 1<<16)}
	var reading sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		_ = socket.Close()
		reading.Wait()
	})
	pub := e.running().ranks[rank].events.pub
	before := pub.Topics()
	if err := socket.Dial(fmt.Sprintf("tcp://127.0.0.1:%d", e.KVEventsPort(rank))); err != nil {
		t.Fatal(err)
	}
	if err := socket.SetOption(zmq4.OptionSubscribe, topic); err != nil {
		t.Fatal(err)
	}
	reading.Go(func() {
		for {
			m, err := socket.Recv()
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				close(s.messages) // the engine is gone
				return
			}
			if len(m.Frames) != 3 {
				t.Errorf("%d frames, want 3", len(m.Frames))
				continue
			}
			s.messages <- kvMessage{string(m.Frames[0]), m.Frames[1], m.Frames[2]}
		}
	})
	eventually(t, "subscribed", func() bool { return pub.Topics() > before })
	return s
}

func (s *kvSubscriber) next(t *testing.T) kvMessage {
	t.Helper()
	select {
	case m := <-s.messages:
		return m
	case <-time.After(patience):
		t.Fatalf("no message within %v", patience)
		return kvMessage{}
	}
}

// types are the types of a payload's events.
func types(payload []byte) (out []string) {
	for _, event := range decoded(payload).([]any)[1].([]any) {
		out = append(out, event.([]pair)[0].value.(string))
	}
	return out
}

// field is a field of a payload's n-th event.
func field(t *testing.T, payload []byte, n int, name string) any {
	t.Helper()
	for _, f := range decoded(payload).([]any)[1].([]any)[n].([]pair) {
		if f.key == name {
			return f.value
		}
	}
	t.Fatalf("no %s in %s", name, payloadText(payload))
	return nil
}

// kvIndex is what a subscriber that missed nothing believes: true for what is cached, false for what was.
type kvIndex map[uint64]bool

func (x kvIndex) size() (n int) {
	for _, cached := range x {
		if cached {
			n++
		}
	}
	return n
}

func (x kvIndex) apply(t *testing.T, payload []byte) {
	t.Helper()
	for i, event := range types(payload) {
		if event == eventCleared {
			clear(x)
			continue
		}
		hashes := field(t, payload, i, "block_hashes").([]any)
		if event == eventStored {
			if n := len(field(t, payload, i, "token_ids").([]any)); uint64(n) != uint64(len(hashes))*field(t, payload, i, "block_size").(uint64) {
				t.Errorf("%d tokens in %d blocks", n, len(hashes))
			}
			// The parent may have gone: two requests computed it, and the block of the other one was the cached one.
			if p, ok := field(t, payload, i, "parent_block_hash").(uint64); ok {
				if _, known := x[p]; !known {
					t.Errorf("parent %d was never stored", p)
				}
			}
		}
		for _, h := range hashes {
			if x[h.(uint64)] == (event == eventStored) {
				t.Errorf("%s of %d, which is in the index: %v", event, h, x[h.(uint64)])
			}
			x[h.(uint64)] = event == eventStored
		}
	}
}

// While eight clients send 200 requests to a cache that is too small for them, a subscriber gets every message in order,
// and what it believes at the end is what the cache holds.
func TestKVEventsTellWhatTheCacheHolds(t *testing.T) {
	e := newEngine(t, Options{NumBlocks: 50, MaxNumSeqs: 6, KVEvents: KVEvents{Endpoint: "tcp://*:0", StepTokens: 64}})
	sub := subscribe(t, e, 0, "")
	var clients sync.WaitGroup
	for c := range 8 {
		clients.Go(func() {
			for i := range 25 {
				r, err := send(t.Context(), t, http.MethodPost, e.URL()+"/v1/completions", complete(prompt(20+i*13, c*i%17), 20, fmt.Sprintf(`,"n":%d`, 1+i%2)))
				if err != nil || r.status != http.StatusOK {
					t.Errorf("status %d, %v", r.status, err)
				}
			}
		})
	}
	clients.Wait()
	settle(t, e)
	index := kvIndex{}
	n := e.Stats().KVEvents
	removed := 0
	for want := range n {
		m := sub.next(t)
		if m.number() != want {
			t.Fatalf("message %d, want %d", m.number(), want)
		}
		index.apply(t, m.payload)
		kinds := types(m.payload)
		if !slices.IsSorted(kinds) { // BlockRemoved before BlockStored
			t.Errorf("order of events: %v", kinds)
		}
		removed += strings.Count(fmt.Sprint(kinds), eventRemoved)
	}
	p := e.running()
	p.mu.Lock()
	defer p.mu.Unlock()
	t.Logf("%d preemptions", int(p.meter.get(metricSlots().preemptions)))
	if removed == 0 || index.size() != len(p.cache.index)+len(p.events.evicted) {
		t.Errorf("%d blocks by %d messages with %d removals, %d in the cache", index.size(), n, removed, len(p.cache.index))
	}
	for _, h := range p.events.held {
		if !index[binary.BigEndian.Uint64(h[24:])] {
			t.Errorf("block %x is cached and was not told", h)
		}
	}
}

func TestKVEventsReplay(t *testing.T) {
	e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0", Replay: "tcp://*:0", Topic: "kv@{addr}@{model}", BufferSteps: 4}})
	sub := subscribe(t, e, 0, "kv@")
	var sent []kvMessage
	for i := range 6 {
		text(t, post(t, e, "/v1/completions", complete(prompt(40, i), 1, "")))
		sent = append(sent, sub.next(t))
	}
	if want := "kv@" + e.Addr().String() + "@tiny"; sent[0].topic != want {
		t.Errorf("topic %q, want %q", sent[0].topic, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dealer := zmq4.NewDealer(ctx)
	defer dealer.Close()
	if err := dealer.Dial(fmt.Sprintf("tcp://127.0.0.1:%d", e.KVReplayPort(0))); err != nil {
		t.Fatal(err)
	}
	f := func(from uint64, want []kvMessage) {
		t.Helper()
		if err := dealer.SendMulti(zmq4.NewMsgFrom([]byte{}, binary.BigEndian.AppendUint64(nil, from))); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			m, err := dealer.Recv()
			if err != nil || len(m.Frames) != 4 || len(m.Frames[0]) != 0 || string(m.Frames[1]) != w.topic ||
				!bytes.Equal(m.Frames[2], w.seq) || !bytes.Equal(m.Frames[3], w.payload) {
				t.Errorf("from %d: %q, %v, want %q", from, m.Frames, err, w)
			}
			var captured [][]byte
			for i := range 4 {
				captured = append(captured, kvFrame(t, fmt.Sprintf("replay_batch.frame%d.bin", i)))
			}
			if got, want := shapes(m.Frames), shapes(captured); !slices.Equal(got, want) {
				t.Errorf("from %d: frames %v, a real server's are %v", from, got, want)
			}
		}
		m, err := dealer.Recv()
		if err != nil || len(m.Frames) != 4 {
			t.Fatalf("end: %q, %v", m.Frames, err)
		}
		for i, frame := range m.Frames {
			if want := kvFrame(t, fmt.Sprintf("replay_end.frame%d.bin", i)); !bytes.Equal(frame, want) {
				t.Errorf("end, frame %d: % x, want % x", i, frame, want)
			}
		}
	}
	f(4, sent[4:])
	f(0, sent[2:]) // the buffer keeps four
	f(6, nil)
	f(1<<63, nil)
}

// shapes tells the frames of a replayed message apart.
func shapes(frames [][]byte) (out []string) {
	for _, f := range frames {
		switch {
		case len(f) == 0:
			out = append(out, "empty")
		case bytes.HasPrefix(f, []byte("kv@")):
			out = append(out, "topic")
		case len(f) == 8:
			out = append(out, "number")
		case f[0] == 0x93: // an array of three
			out = append(out, "batch")
		default:
			out = append(out, "something else")
		}
	}
	return out
}

// TestKVEventsReplayRequests: what is no request gets no answer.
func TestKVEventsReplayRequests(t *testing.T) {
	e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0", Replay: "tcp://*:0"}})
	text(t, post(t, e, "/v1/completions", complete(prompt(40, 1), 1, "")))
	f := func(answers int, request ...string) {
		t.Helper()
		var frames [][]byte
		for _, r := range request {
			frames = append(frames, []byte(r))
		}
		got := 0
		e.running().events.answerReplay(frames, func(...[]byte) error { got++; return nil })
		if got != answers {
			t.Errorf("%q: %d answers, want %d", request, got, answers)
		}
	}
	f(0)
	f(0, "")
	f(0, "", "\x00", "\x00")
	f(0, "x", "\x00")
	f(0, "", "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	f(2, "", "")
	f(2, "", "\x00\x00\x00\x00\x00\x00\x00\x00")
	f(1, "", "\xff\xff\xff\xff\xff\xff\xff\xff")
}

func TestKVEventsAfterRestart(t *testing.T) {
	for _, clears := range []bool{false, true} {
		t.Run(fmt.Sprintf("clears=%v", clears), func(t *testing.T) {
			e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0", Replay: "tcp://*:0", ClearOnStart: clears}})
			events, replay := e.KVEventsPort(0), e.KVReplayPort(0)
			text(t, post(t, e, "/v1/completions", complete(prompt(40, 1), 1, "")))
			before := subscribe(t, e, 0, "")
			e.Kill()
			eventually(t, "end of the connection", func() bool {
				select {
				case _, more := <-before.messages:
					return !more
				default:
					return false
				}
			})
			for _, port := range []int{events, replay} {
				if _, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("port %d of a killed engine: %v", port, err)
				}
			}
			if err := e.Restart(); err != nil {
				t.Fatal(err)
			}
			if e.KVEventsPort(0) != events || e.KVReplayPort(0) != replay {
				t.Errorf("ports %d and %d, were %d and %d", e.KVEventsPort(0), e.KVReplayPort(0), events, replay)
			}
			sub := subscribe(t, e, 0, "")
			text(t, post(t, e, "/v1/completions", complete(prompt(40, 1), 1, "")))
			m := sub.next(t)
			want := []string{eventStored}
			if clears {
				want = []string{eventCleared, eventStored}
			}
			if m.number() != 0 || !slices.Equal(types(m.payload), want) {
				t.Errorf("message %d: %v, want 0: %v", m.number(), types(m.payload), want)
			}
		})
	}
}

func TestKVEventsFaults(t *testing.T) {
	tests := []struct {
		name, faults string
		want         []int
	}{
		{"none", `{}`, []int{0, 1, 2, 3, 4, 5}},
		{"drop one in three", `{"kv_events":"drop","kv_events_every":3}`, []int{0, 1, 3, 4}},
		{"duplicate", `{"kv_events":"duplicate"}`, []int{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5}},
		{"reorder one in two", `{"kv_events":"reorder","kv_events_every":2}`, []int{0, 2, 1, 4, 3}},
		{"reorder each", `{"kv_events":"reorder"}`, []int{1, 0, 3, 2, 5, 4}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0", Replay: "tcp://*:0"}})
			sub := subscribe(t, e, 0, "")
			if r := post(t, e, "/admin/faults", tt.faults); r.status != http.StatusOK {
				t.Fatalf("status %d: %s", r.status, r.body)
			}
			for i := range 6 {
				text(t, post(t, e, "/v1/completions", complete(prompt(40, i), 1, "")))
			}
			for i, want := range tt.want {
				if m := sub.next(t); m.number() != want {
					t.Errorf("%d-th message is %d, want %d", i, m.number(), want)
				}
			}
			if r := post(t, e, "/admin/faults", `{}`); r.status != http.StatusOK {
				t.Fatalf("status %d: %s", r.status, r.body)
			}
			text(t, post(t, e, "/v1/completions", complete(prompt(40, 6), 1, "")))
			if m := sub.next(t); m.number() != 6 {
				t.Errorf("one more: %d", m.number())
			}
			if _, kept := e.running().events.replay.from(0); len(kept) != 7 {
				t.Errorf("%d messages to replay, want all 7", len(kept))
			}
		})
	}
	e := newEngine(t, Options{})
	if r := post(t, e, "/admin/faults", `{"kv_events":"eat"}`); r.status != http.StatusBadRequest {
		t.Errorf("an unknown fault: status %d", r.status)
	}
}
