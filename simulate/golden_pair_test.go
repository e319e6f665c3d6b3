// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// pairCase is how one captured decode leg came about: what was done to the handle, the engines or the prompt.
type pairCase struct {
	edit     map[string]any // fields of the handle replaced; nil removes
	only     bool           // the handle is {"do_remote_prefill":true}
	policy   string
	prefill  func(prompt []json.RawMessage) []json.RawMessage // the prompt of the prefill leg, when it is another
	n        int                                              // answers asked of the prefill leg
	between  func(t *testing.T, prefill, decode *Engine)      // after the prefill
	lease    time.Duration
	blocks   int  // of the prefill engine
	twice    bool // the handle was used before
	forgets  bool // usage is not comparable
	survives bool // 500, and the engine lives on
	shakes   bool // the engines know each other
}

func pairCases() map[string]pairCase {
	down := func(_ *testing.T, p, _ *Engine) { p.Kill() }
	up := func(t *testing.T, p, _ *Engine) {
		t.Helper()
		if err := p.Restart(); err != nil {
			t.Fatal(err)
		}
	}
	expire := func(t *testing.T, p, _ *Engine) {
		t.Helper()
		eventually(t, "lease expired", func() bool { return len(p.Leaked()) == 1 })
	}
	overwrite := func(t *testing.T, p, d *Engine) {
		t.Helper()
		expire(t, p, d)
		for i := range 4 {
			post(t, p, "/v1/completions", complete(prompt(200, 50+i), 1, ""))
		}
	}
	return map[string]pairCase{
		"decode_basic": {}, "decode_cached": {}, "decode_chat_stream": {forgets: true}, "g_decode_max_tokens_1": {},
		"i_messages_decode": {forgets: true}, "i_responses_decode": {forgets: true},
		"c_handle_twice": {twice: true}, "h_prefill_n1_decode_n2": {}, "h_decode_n2": {n: 2},
		"c_handle_stale_overwritten":  {between: overwrite, lease: time.Second, blocks: 10},
		"c_prefill_down":              {policy: policyRecompute, between: down},
		"c_prefill_up":                {policy: policyRecompute, between: up},
		"f_decode_after_expiry":       {between: expire, lease: time.Second},
		"d_block_ids_out_of_range":    {edit: map[string]any{"remote_block_ids": [][]int{{90000, 90001, 90002, 90003, 90004, 90005, 90006}}}, survives: true},
		"d_no_block_ids":              {edit: map[string]any{"remote_block_ids": json.RawMessage("null")}},
		"d_only_do_remote_prefill":    {only: true},
		"d_wrong_engine_id":           {edit: map[string]any{"remote_engine_id": "00000000-0000-0000-0000-000000000000"}, survives: true},
		"d_recompute_wrong_engine_id": {edit: map[string]any{"remote_engine_id": "00000000-0000-0000-0000-000000000000"}, policy: policyRecompute},
		"d_wrong_port": {
			edit: map[string]any{"remote_port": 18999, "remote_engine_id": "11111111-0000-0000-0000-000000000000"}, survives: true,
		},
		"d_recompute_wrong_port": {
			edit: map[string]any{"remote_port": 18999, "remote_engine_id": "11111111-0000-0000-0000-000000000000"}, policy: policyRecompute,
		},
		"d_wrong_host": {
			edit: map[string]any{"remote_host": "127.0.0.77", "remote_engine_id": "22222222-0000-0000-0000-000000000000"}, survives: true,
		},
		"d_wrong_host_known_engine": {edit: map[string]any{"remote_host": "127.0.0.77"}, shakes: true},
		"x_decode_longer_prompt":    {prefill: func(p []json.RawMessage) []json.RawMessage { return p[:200] }},
		"x_decode_shorter_prompt":   {prefill: func(p []json.RawMessage) []json.RawMessage { return append(slices.Clone(p), p...) }},
	}
}

// TestGoldenDecodeLegs repeats every captured decode leg on a pair of engines, with a handle of its own.
func TestGoldenDecodeLegs(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "pd_decode", "*.response.http"))
	if err != nil || len(files) != len(pairCases()) {
		t.Fatalf("%d captures for %d cases, %v", len(files), len(pairCases()), err)
	}
	for name, tt := range pairCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := readGolden(t, "pd_decode", name)
			o := goldenOptions("pd")
			o.LoadFailurePolicy, o.Lease, o.Seed = tt.policy, tt.lease, 7
			if o.Lease == 0 {
				o.Lease = 10 * time.Hour
			}
			p, d := goldenPair(t, o, tt.blocks)
			path := goldenPath(map[string]string{
				"decode_chat_stream": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses", "completion": "/v1/completions",
			}, g)
			g.request = ownHandle(t, p, d, tt, path, g.request)
			got := compareGolden(t, d, g, path)
			if g.status == 500 && !tt.survives {
				eventually(t, "dead", func() bool { return len(d.Deaths()) == 1 })
			} else if len(d.Deaths()) > 0 {
				t.Errorf("died: %v", d.Deaths())
			}
			if !tt.forgets && g.status == 200 {
				compareUsage(t, got.body, g)
			}
		})
	}
}

// goldenPair is a pair whose prefill engine may have fewer blocks. A pull that failed leaves the prefill's blocks to their
// lease.
func goldenPair(t *testing.T, o Options, blocks int) (p, d *Engine) {
	t.Helper()
	o.Peers = NewRegistry()
	o.Name, o.Role = "d", phaseDecode
	d = newEngine(t, o)
	o.Name, o.Role = "p", phasePrefill
	if blocks > 0 {
		o.NumBlocks, o.MaxModelLen = blocks, 0
	}
	return newEngine(t, o), d
}

// ownHandle runs the prefill leg of a captured decode leg and puts its handle in the place of the captured one.
func ownHandle(t *testing.T, p, d *Engine, tt pairCase, path, captured string) string {
	t.Helper()
	var body map[string]json.RawMessage
	if err := json.Unmarshal([]byte(captured), &body); err != nil {
		t.Fatal(err)
	}
	var was struct {
		Cached int `json:"remote_prefill_cached_tokens"`
	}
	if err := json.Unmarshal(body["kv_transfer_params"], &was); err != nil {
		t.Fatal(err)
	}
	leg := map[string]any{"model": "tiny", "max_tokens": 1, "max_output_tokens": 1, "temperature": 0}
	for _, k := range []string{"prompt", "messages", "input"} {
		if v, ok := body[k]; ok {
			leg[k] = v
		}
	}
	if tt.prefill != nil {
		var ids []json.RawMessage
		if err := json.Unmarshal(body["prompt"], &ids); err != nil {
			t.Fatal(err)
		}
		leg["prompt"] = tt.prefill(ids)
	}
	if was.Cached > 0 {
		post(t, p, path, string(marshal(leg)))
	}
	leg["kv_transfer_params"] = map[string]any{"do_remote_decode": true}
	if tt.n > 1 {
		leg["n"] = tt.n
	}
	if tt.shakes {
		h := prefillLeg(t, p, prompt(40, 99), "")
		post(t, d, "/v1/completions", complete(prompt(40, 99), 1, withHandle(h)))
	}
	r := post(t, p, path, string(marshal(leg)))
	var answer struct {
		KV json.RawMessage `json:"kv_transfer_params"`
	}
	if err := json.Unmarshal(r.body, &answer); err != nil || len(answer.KV) < 10 {
		t.Fatalf("prefill: %v, %s", err, r.body)
	}
	if tt.between != nil {
		tt.between(t, p, d)
	}
	body["kv_transfer_params"] = json.RawMessage(edited(t, string(answer.KV), tt.edit))
	if tt.only {
		body["kv_transfer_params"] = json.RawMessage(`{"do_remote_prefill":true}`)
	}
	if tt.twice {
		first := body["cache_salt"]
		body["cache_salt"] = json.RawMessage(`"first"`)
		post(t, d, path, string(marshal(body)))
		body["cache_salt"] = first
	}
	return string(marshal(body))
}

// compareUsage wants the same numbers of tokens where the prompt was given as ids.
func compareUsage(t *testing.T, got []byte, g golden) {
	t.Helper()
	usage := func(b []byte) string {
		var v struct {
			Usage json.RawMessage `json:"usage"`
		}
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		return string(v.Usage)
	}
	if a, b := usage(got), usage([]byte(g.body)); a != b {
		t.Errorf("usage\n got %s\nwant %s", a, b)
	}
}
