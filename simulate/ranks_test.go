// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// onRank is the header that chooses a rank.
func onRank(n int) []string { return []string{headerRank, strconv.Itoa(n)} }

// newRanks is a pair of n ranks each.
func newRanks(t *testing.T, n int, change func(*Options)) (p, d *Engine) {
	t.Helper()
	o := pairOptions
	o.Ranks = n
	change(&o)
	return newPair(t, o)
}

func TestRankHeader(t *testing.T) {
	e, _ := newRanks(t, 3, func(*Options) {})
	tests := []struct {
		header string
		status int
		rank   int // -1: any
	}{
		{"0", 200, 0}, {"2", 200, 2}, {" 1 ", 200, 1}, {"3", 400, 0}, {"-1", 400, 0}, {"99999", 400, 0}, {"one", 200, -1}, {"", 200, -1}, {"1.0", 200, -1},
	}
	for i, tt := range tests {
		t.Run(tt.header, func(t *testing.T) {
			r := post(t, e, "/v1/completions", complete(prompt(64, i), 1, askHandle), headerRank, tt.header)
			if r.status != tt.status {
				t.Fatalf("status %d, want %d: %s", r.status, tt.status, r.body)
			}
			if tt.status == http.StatusBadRequest {
				if !strings.Contains(string(r.body), "is out of range [0, 3)") {
					t.Errorf("body: %s", r.body)
				}
				return
			}
			h := transferOf(t, r)
			port, _ := h["remote_port"].(float64)
			rank := int(port) - e.P2PPort()
			if tt.rank >= 0 && rank != tt.rank {
				t.Errorf("rank %d, want %d", rank, tt.rank)
			}
			if h["remote_engine_id"] != e.RankIDs()[rank] {
				t.Errorf("engine id %v of rank %d, want %s", h["remote_engine_id"], rank, e.RankIDs()[rank])
			}
			if held := e.Held(); held[len(held)-1].Rank != rank {
				t.Errorf("held: %+v", held)
			}
		})
	}
	leaks(t, e, 6)
}

func TestRanksHaveTheirOwnIDsAndPorts(t *testing.T) {
	p, d := newRanks(t, 4, func(*Options) {})
	ids := append(p.RankIDs(), d.RankIDs()...)
	slices.Sort(ids)
	if len(slices.Compact(ids)) != 8 || p.ID() != p.RankIDs()[0] {
		t.Errorf("ids: %v", ids)
	}
	if p.P2PPort() != firstSidePort || d.P2PPort() != firstSidePort+4 {
		t.Errorf("ports %d and %d", p.P2PPort(), d.P2PPort())
	}
	before := p.RankIDs()
	if err := p.Restart(); err != nil {
		t.Fatal(err)
	}
	for i, id := range p.RankIDs() {
		if id == before[i] {
			t.Errorf("rank %d kept its id over a restart", i)
		}
	}
}

func TestEveryRankTransfersToEveryRank(t *testing.T) {
	p, d := newRanks(t, 2, func(*Options) {})
	for i, c := range [][2]int{{0, 0}, {0, 1}, {1, 0}, {1, 1}} {
		want := text(t, post(t, p, "/v1/completions", complete(prompt(200, i), 8, `,"cache_salt":"s"`)))
		r := post(t, p, "/v1/completions", complete(prompt(200, i), 1, askHandle), onRank(c[0])...)
		got := post(t, d, "/v1/completions", complete(prompt(200, i), 8, extra(t, transferOf(t, r))), onRank(c[1])...)
		if text(t, got) != want {
			t.Errorf("%v: text %q, want %q", c, text(t, got), want)
		}
	}
	if s := d.Stats(); s.Pulls != 4 || s.WrongPulls != 0 {
		t.Errorf("stats: %+v", s)
	}
	leaks(t, p, 0)
}

func TestRanksDoNotShareBlocks(t *testing.T) {
	p, _ := newRanks(t, 2, func(*Options) {})
	cached := func(rank int) any {
		r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, ""), onRank(rank)...)
		return r.json(t)["usage"].(map[string]any)["prompt_tokens_details"].(map[string]any)["cached_tokens"]
	}
	for _, c := range []struct {
		rank int
		want float64
	}{{0, 0}, {1, 0}, {0, 192}, {1, 192}} {
		if got := cached(c.rank); got != c.want {
			t.Errorf("rank %d: %v cached tokens, want %v", c.rank, got, c.want)
		}
	}
	if s := p.Stats(); s.PromptTokens != 800 || s.PrefixHits != 384 {
		t.Errorf("stats: %+v", s)
	}
}

func TestLeastLoadedRank(t *testing.T) {
	p, _ := newRanks(t, 2, func(o *Options) { o.InterToken = time.Hour })
	busy, stop := begin(t, p, complete(prompt(64, 5), 1000, ""))
	eventually(t, "busy", func() bool { return p.Stats().Running == 1 })
	rank := slices.IndexFunc(p.current.ranks, func(q *process) bool { return q.load4() > 0 })
	for i := range 4 {
		post(t, p, "/v1/completions", complete(prompt(64, 10+i), 1, askHandle))
	}
	for _, h := range p.Held() {
		if h.State == "lease" && h.Rank == rank {
			t.Errorf("on the busy rank: %+v", h)
		}
	}
	stop()
	<-busy
	leaks(t, p, 4)
}

// TestWrongRank is a handle whose port is another rank's: refused by the handshake, or, where nothing checks it,
// another prompt's KV.
func TestWrongRank(t *testing.T) {
	for _, mix := range []bool{false, true} {
		t.Run(fmt.Sprintf("mix=%v", mix), func(t *testing.T) {
			t.Parallel()
			p, d := newRanks(t, 2, func(o *Options) { o.MixRanks = mix })
			want := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 8, `,"cache_salt":"s"`)))
			post(t, p, "/v1/completions", complete(prompt(300, 7), 1, ""), onRank(0)...)
			r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, askHandle), onRank(1)...)
			h := transferOf(t, r)
			h["remote_port"] = p.P2PPort()
			got := post(t, d, "/v1/completions", complete(prompt(200, 1), 8, extra(t, h)))
			if !mix {
				if got.status != http.StatusInternalServerError || d.Stats().FailedPulls != 1 {
					t.Errorf("status %d, stats %+v", got.status, d.Stats())
				}
			} else if s := d.Stats(); text(t, got) == want || s.WrongPulls != 1 {
				t.Errorf("text %q, stats %+v", text(t, got), s)
			}
			leaks(t, p, 1)
		})
	}
}

func TestRankMetrics(t *testing.T) {
	p, _ := newRanks(t, 2, func(*Options) {})
	post(t, p, "/v1/completions", complete(prompt(200, 1), 1, ""), onRank(1)...)
	for rank, want := range []string{"0.0", "200.0"} {
		if v := metric(t, p, fmt.Sprintf(`vllm:prompt_tokens_total{engine="%d",model_name="tiny"}`, rank)); v != want {
			t.Errorf("rank %d: %s prompt tokens, want %s", rank, v, want)
		}
	}
	page := string(get(t, p, "/metrics").body)
	if n := strings.Count(page, "# TYPE vllm:num_requests_running gauge\n"); n != 1 {
		t.Errorf("%d heads of one family", n)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(page) {
		name, _, _ := strings.Cut(line, "} ")
		if line[0] != '#' && strings.Contains(name, "{") && seen[name] {
			t.Errorf("twice: %s", line)
		}
		seen[name] = true
	}
	if one := string(get(t, p, "/metrics/?name[]=vllm:num_requests_running").body); strings.Count(one, "\nvllm:") != 2 {
		t.Errorf("by name: %s", one)
	}
	if err := p.SetFaults(Faults{Metrics: metricsFrozen}); err != nil {
		t.Fatal(err)
	}
	get(t, p, "/metrics")
	post(t, p, "/v1/completions", complete(prompt(200, 2), 1, ""), onRank(1)...)
	if v := metric(t, p, `vllm:prompt_tokens_total{engine="1",model_name="tiny"}`); v != "200.0" {
		t.Errorf("frozen: %s prompt tokens", v)
	}
}

func TestMooncakeRanks(t *testing.T) {
	p, d := newRanks(t, 2, func(o *Options) { o.Connector = "mooncake" })
	for rank := range 2 {
		id := fmt.Sprintf("xfer-%d", rank)
		body := fmt.Sprintf(`,"kv_transfer_params":{"do_remote_decode":true,"transfer_id":"%s"}`, id)
		post(t, p, "/v1/completions", complete(prompt(200, rank), 1, body), onRank(rank)...)
		params := map[string]any{
			"do_remote_prefill": true, "transfer_id": id, "remote_engine_id": p.RankIDs()[rank], "remote_bootstrap_addr": bootstrapURL(p),
		}
		if r := post(t, d, "/v1/completions", complete(prompt(200, rank), 1, extra(t, params))); r.status != http.StatusOK {
			t.Errorf("rank %d: status %d", rank, r.status)
		}
	}
	leaks(t, p, 0)
}

func TestRankPorts(t *testing.T) {
	pool, err := NewPool(PoolOptions{Prefill: 2, Decode: 1, RankPorts: true, Template: Options{Ranks: 2, Scale: fast}})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i, e := range pool.Engines() {
		names = append(names, e.Name())
		if e.P2PPort() != firstSidePort+i || e.opts.Ranks != 1 {
			t.Errorf("%s: port %d, %d ranks", e.Name(), e.P2PPort(), e.opts.Ranks)
		}
	}
	if got := strings.Join(names, " "); got != "prefill-0-rank-0 prefill-0-rank-1 prefill-1-rank-0 prefill-1-rank-1 decode-0-rank-0 decode-0-rank-1" {
		t.Errorf("engines: %s", got)
	}
	if err := pool.Close(); err != nil {
		t.Error(err)
	}
}

func TestRanksOutOfRange(t *testing.T) {
	for _, o := range []Options{{Ranks: 9}, {Ranks: -1}, {Ranks: 2, Generation: "old"}, {Ranks: 2, Engine: "sglang"}} {
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), "--data-parallel-size") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
