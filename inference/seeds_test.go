// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A seed is a request that a real vLLM answered (testdata/README.md).
type seed struct {
	api  API
	name string
	body []byte
}

func seeds(tb testing.TB) []seed {
	tb.Helper()
	files, err := filepath.Glob("testdata/*.request.json")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no seeds: %v", err)
	}
	var out []seed
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			tb.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".request.json")
		api := Completions
		for word, a := range map[string]API{"chat": Chat, "responses": Responses, "messages": Messages, "generate": Generate, "embeddings": Embeddings} {
			if strings.Contains(name, word) {
				api = a
			}
		}
		out = append(out, seed{api, name, body})
	}
	return out
}

// randomKeys are those that mean something, and a few that nearly do.
var randomKeys = strings.Fields(`model stream max_tokens max_completion_tokens max_output_tokens max_new_tokens n cache_salt
extra_key echo prompt_logprobs best_of use_beam_search truncate_prompt_tokens truncation previous_response_id messages
tools prompt prompt_embeds input instructions system token_ids text input_ids image_data audio_data video_data
sampling_params extra_args vllm_xargs kv_transfer_params ec_transfer_params disaggregated_params bootstrap_host
bootstrap_ bootstrap Model type source role content name arguments output tool_calls image_url audio_url video_url input_audio x`)

var randomScalars = []string{
	`null`, `true`, `false`, `0`, `1`, `2`, `-1`, `1.0`, `2e1`, `1.5`, `1e400`, `99999999999`, `NaN`, `-Infinity`, `Infinity`,
	`""`, `"tiny"`, `"auto"`, `"\u0061uto"`, `"image"`, `"é\n日本"`, `"\ud83d\ude00\ud83d"`, `"on"`, `"7"`, `"a longer text with \"quotes\" and more"`,
}

// randomRequest makes a JSON object with duplicate and escaped keys and white space in odd places.
func randomRequest(r *rand.Rand) []byte {
	g := generator{r: r}
	g.object(0)
	return []byte(g.b.String())
}

type generator struct {
	r *rand.Rand
	b strings.Builder
}

func (g *generator) space() { g.b.WriteString([]string{"", "", "", " ", "\n\t"}[g.r.IntN(5)]) }

func (g *generator) object(depth int) {
	g.b.WriteByte('{')
	for i := range g.r.IntN(7) {
		if i > 0 {
			g.b.WriteByte(',')
		}
		g.space()
		g.key()
		g.space()
		g.b.WriteByte(':')
		g.value(depth + 1)
		g.space()
	}
	g.b.WriteByte('}')
}

func (g *generator) key() {
	g.b.WriteByte('"')
	for _, c := range []byte(randomKeys[g.r.IntN(len(randomKeys))]) {
		if g.r.IntN(20) == 0 {
			g.b.WriteString(`\u00` + string("0123456789abcdef"[c>>4]) + string("0123456789aBcDEF"[c&15]))
		} else {
			g.b.WriteByte(c)
		}
	}
	g.b.WriteByte('"')
}

func (g *generator) value(depth int) {
	g.space()
	switch n := g.r.IntN(10); {
	case n < 2 && depth < 5:
		g.object(depth)
	case n < 5 && depth < 5:
		g.b.WriteByte('[')
		numbers := g.r.IntN(2) == 0
		for i := range g.r.IntN(4) {
			if i > 0 {
				g.b.WriteByte(',')
			}
			if numbers {
				g.b.WriteString(" 17")
			} else {
				g.value(depth + 1)
			}
		}
		g.b.WriteByte(']')
	default:
		g.b.WriteString(randomScalars[g.r.IntN(len(randomScalars))])
	}
}
