// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/alloctest"
)

// Made by msgspec from the classes as they were before PR #42892: arrays that begin with the type and leave nothing out.
func TestKVEventsAsArrays(t *testing.T) {
	e := newEngine(t, Options{
		BlockSize: 2, NumBlocks: 4, HashSeed: "0", LoRAs: []string{"sql"}, Connector: connectorOffload,
		KVEvents: KVEvents{Endpoint: "tcp://*:0", Encoding: encodingArray},
	})
	sub := subscribe(t, e, 0, "")
	next := func(want string) {
		t.Helper()
		if m := sub.next(t); hex.EncodeToString(withoutTime(t, m.payload)) != want {
			t.Errorf("%s\n%x\nwant\n%s", payloadText(m.payload), withoutTime(t, m.payload), want)
		}
	}
	const (
		stored = "9cab426c6f636b53746f72656491cfa6a9c4e888af6d5fc092010202c0a3475055c091c000ae66756c6c5f617474656e74696f6ec0"
		tuned  = "9cab426c6f636b53746f72656492cfe2fd918d44290963cf71dd962e68ee6401c0940102ce00011170040201a3475055a373716c9292a373716ca17391a373716c00" +
			"ae66756c6c5f617474656e74696f6ec0"
		parked  = "9cab426c6f636b53746f72656491cfa6a9c4e888af6d5fc09002c0a3435055c0c0c0c0c0"
		removed = "94ac426c6f636b52656d6f76656491cfa6a9c4e888af6d5fa347505500"
		cleared = "91b0416c6c426c6f636b73436c6561726564"
	)
	text(t, post(t, e, "/v1/completions", complete("[1,2,3]", 1, "")))
	next("91" + stored + "00")
	tunedBody := strings.Replace(complete("[1,2,70000,4,5]", 1, `,"cache_salt":"s"`), `"tiny"`, `"sql"`, 1)
	text(t, post(t, e, "/v1/completions", tunedBody))
	next("92" + removed + tuned + "00")
	post(t, e, "/reset_prefix_cache", "")
	text(t, post(t, e, "/v1/completions", complete("[1,2,3]", 1, `,"kv_transfer_params":{"remote_decoder":{"kv_request_id":"a"}}`)))
	next("92" + cleared + stored + "00")
	next("91" + parked + "00")
}

// What decode pulled is cached there as if it had been computed there, and so is told.
func TestKVEventsOfPulledBlocks(t *testing.T) {
	p, d := newPair(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	fromP, fromD := subscribe(t, p, 0, ""), subscribe(t, d, 0, "")
	handle := prefillLeg(t, p, prompt(100, 1), "")
	text(t, post(t, d, "/v1/completions", complete(prompt(100, 1), 30, withHandle(handle))))
	computed, pulled := fromP.next(t), fromD.next(t)
	if got, want := field(t, pulled.payload, 0, "block_hashes"), field(t, computed.payload, 0, "block_hashes"); inWords(got) != inWords(want) || len(got.([]any)) != 6 {
		t.Errorf("pulled %v, computed %v", got, want)
	}
	grown := fromD.next(t) // the seventh block is full after 12 tokens
	if hashes := field(t, pulled.payload, 0, "block_hashes").([]any); field(t, grown.payload, 0, "parent_block_hash") != hashes[5] {
		t.Errorf("after the pull: %s", payloadText(grown.payload))
	}
}

// The offloading connector tells hashes only, for what it parks and for what it drops.
func TestKVEventsOfParkedBlocks(t *testing.T) {
	e := newEngine(t, Options{Connector: connectorOffload, KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	sub := subscribe(t, e, 0, "")
	park := `,"kv_transfer_params":{"remote_decoder":{"kv_request_id":"a"}}`
	text(t, post(t, e, "/v1/completions", complete(prompt(100, 1), 1, park)))
	gpu, cpu := sub.next(t), sub.next(t)
	hashes := inWords(field(t, gpu.payload, 0, "block_hashes"))
	want := `{type:"BlockStored",block_hashes:` + hashes + `,parent_block_hash:<nil>,token_ids:[],block_size:16,lora_id:<nil>,medium:"CPU",lora_name:<nil>}`
	if got := payloadText(cpu.payload); !strings.Contains(got, "["+want+"]") {
		t.Errorf("parked: %s\nwant %s", got, want)
	}
	settle(t, e)
	text(t, post(t, e, "/v1/completions", complete(prompt(40, 2), 1, "")))
	want = `{type:"BlockRemoved",block_hashes:` + hashes + `,medium:"CPU"},{type:"BlockStored",`
	if got := payloadText(sub.next(t).payload); !strings.Contains(got, want) {
		t.Errorf("dropped: %s\nwant %s", got, want)
	}
}

// A reset while blocks are in use clears the rest alone, block by block; one of an empty cache is told all the same.
func TestKVEventsOfResets(t *testing.T) {
	e := newEngine(t, Options{Lease: 10 * time.Hour, KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	sub := subscribe(t, e, 0, "")
	text(t, post(t, e, "/v1/completions", complete(prompt(40, 1), 1, "")))
	sub.next(t)
	prefillLeg(t, e, prompt(40, 2), "") // holds its blocks
	sub.next(t)
	reset := func() {
		t.Helper()
		if r := post(t, e, "/reset_prefix_cache", ""); r.status != http.StatusOK {
			t.Fatal(r.status)
		}
	}
	next := func(seed int, want ...string) {
		t.Helper()
		text(t, post(t, e, "/v1/completions", complete(prompt(40, seed), 1, "")))
		if got := types(sub.next(t).payload); !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
	reset()
	next(3, eventRemoved, eventRemoved, eventStored)
	leaks(t, e, 1)
	reset()
	if e.Stats().KVEvents != 3 {
		t.Errorf("a reset alone sends a message: %d", e.Stats().KVEvents)
	}
	next(3, eventCleared, eventStored)
}

// Prompts without a full block, and blocks that are cached, are not worth a message.
func TestKVEventsOnlyOfNewBlocks(t *testing.T) {
	e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	for _, body := range []string{complete(prompt(15, 1), 1, ""), complete(prompt(40, 2), 1, `,"n":2`), complete(prompt(40, 2), 1, "")} {
		text(t, post(t, e, "/v1/completions", body))
	}
	if n := e.Stats().KVEvents; n != 1 {
		t.Errorf("%d messages, want 1", n)
	}
}

// A block that was stored right before its request was preempted is told before its eviction is.
func TestKVEventsOfPreemption(t *testing.T) {
	e := newEngine(t, Options{BlockSize: 2, NumBlocks: 5, Lease: 10 * time.Hour, KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	sub := subscribe(t, e, 0, "")
	prefillLeg(t, e, "[9]", "") // one block less until its lease ends
	// The first token fills the first answer's second block, and there is none for the second answer's.
	answer, _ := begin(t, e, complete("[[1,2,3],[4,5]]", 2, ""))
	p := e.running()
	eventually(t, "preempted", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.meter.get(metricSlots().preemptions) > 0
	})
	leaks(t, e, 1)
	text(t, <-answer)
	index := kvIndex{}
	for range e.Stats().KVEvents {
		index.apply(t, sub.next(t).payload)
	}
}

// A block with a part of an image is told with the image's hash and where it begins, seen from the block.
func TestKVEventsOfMedia(t *testing.T) {
	e := newEngine(t, Options{KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	sub := subscribe(t, e, 0, "")
	text := strings.Repeat("four", 14) // behind the two tokens that open the message: a block
	r := post(t, e, "/v1/chat/completions", `{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":[{"type":"text","text":"`+text+`"},`+
		`{"type":"image_url","image_url":{"url":"http://x/1.png"},"uuid":"cat"},{"type":"text","text":"`+text+`"}]}]}`)
	if r.status != http.StatusOK {
		t.Fatalf("status %d: %s", r.status, r.body)
	}
	if got, want := inWords(field(t, sub.next(t).payload, 0, "extra_keys")), `[<nil>,[["cat",0]],[["cat",-16]],[["cat",-32]],[["cat",-48]],<nil>]`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// Each rank has its port, its sequence and its number.
func TestKVEventsOfRanks(t *testing.T) {
	e := newEngine(t, Options{Ranks: 2, KVEvents: KVEvents{Endpoint: "tcp://*:0"}})
	for rank := range 2 {
		sub := subscribe(t, e, rank, "")
		text(t, post(t, e, "/v1/completions", complete(prompt(40, rank), 1, ""), headerRank, strconv.Itoa(rank)))
		m := sub.next(t)
		if got := decoded(m.payload).([]any)[2]; m.number() != 0 || got != uint64(rank) {
			t.Errorf("rank %d: message %d of rank %v", rank, m.number(), got)
		}
	}
	r := get(t, e, "/kv_event_sources")
	for rank := range 2 {
		if want := fmt.Sprintf(`"%d":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:%d","replay_endpoint":null,`, rank, e.KVEventsPort(rank)); !strings.Contains(string(r.body), want) {
			t.Errorf("%s lacks %s", r.body, want)
		}
	}
}

// An engine without KV events has nothing of them.
func TestKVEventsOff(t *testing.T) {
	e := newEngine(t, Options{})
	text(t, post(t, e, "/v1/completions", complete(prompt(40, 1), 1, "")))
	if p := e.running(); p.events != nil || p.cache.evicted != nil || e.KVEventsPort(0) != 0 || get(t, e, "/kv_event_sources").status != http.StatusNotFound {
		t.Error("events without an endpoint")
	}
}

func TestKVEventsOffAllocations(t *testing.T) {
	p := newEngine(t, Options{}).running()
	alloctest.AtMost(t, 0, "events", func() { p.announce(nil, 0, 0); p.flush() })
}

func TestKVEventsOptions(t *testing.T) {
	tests := []struct {
		name string
		o    PoolOptions
		want string // in the error
	}{
		{"another engine's", PoolOptions{Plain: 1, Template: Options{Engine: "sglang", KVEvents: KVEvents{Endpoint: "tcp://*:0"}}}, "not those of sglang"},
		{"an address of its own", PoolOptions{Plain: 1, Template: Options{KVEvents: KVEvents{Endpoint: "tcp://127.0.0.1:5557"}}}, "--kv-events-endpoint"},
		{"no port", PoolOptions{Plain: 1, Template: Options{KVEvents: KVEvents{Endpoint: "tcp://*:"}}}, "--kv-events-endpoint"},
		{"ranks above the last port", PoolOptions{Plain: 1, Template: Options{Ranks: 2, KVEvents: KVEvents{Endpoint: "tcp://*:65535"}}}, "--kv-events-endpoint: \"tcp://*:65535\", must leave 2 ports"},
		{"replay alone", PoolOptions{Plain: 1, Template: Options{KVEvents: KVEvents{Replay: "tcp://*:0"}}}, "--kv-events-replay-endpoint"},
		{"unknown encoding", PoolOptions{Plain: 1, Template: Options{KVEvents: KVEvents{Encoding: "json"}}}, "--kv-events-encoding"},
		{"buffer", PoolOptions{Plain: 1, Template: Options{KVEvents: KVEvents{BufferSteps: -1}}}, "BufferSteps"},
		{"ports given out twice", PoolOptions{Plain: 2, Template: Options{KVEvents: KVEvents{Endpoint: "tcp://*:5557", Replay: "tcp://*:5558"}}}, "must be 2 apart"},
		{"ports apart", PoolOptions{Plain: 2, Template: Options{KVEvents: KVEvents{Endpoint: "tcp://*:5557", Replay: "tcp://*:5559"}}}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := NewPool(tt.o)
			if got := fmt.Sprint(err); (err == nil) != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Fatalf("error %s, want %q", got, tt.want)
			}
			if err == nil && p.Engines()[1].opts.KVEvents.Replay != "tcp://*:5560" {
				t.Errorf("second engine: %+v", p.Engines()[1].opts.KVEvents)
			}
		})
	}
}
