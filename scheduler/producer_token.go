// SPDX-License-Identifier: Apache-2.0

package scheduler

import "github.com/baton-epp/baton/config"

// tokenParameters configure a token-producer (llm-d-router v0.10). Only the estimate is built: four bytes of
// prompt to a token, media by their kind. The estimate's own numbers are accepted and checked, the defaults are used.
type tokenParameters struct {
	Estimate struct {
		Image struct {
			Mode              string     `yaml:"mode"` // dynamic (default) or static
			DefaultResolution resolution `yaml:"defaultResolution"`
			Dynamic           struct {
				Factor int `yaml:"factor"` // pixels in a token, default 1024
			} `yaml:"dynamic"`
			Static struct {
				StaticToken int `yaml:"staticToken"` // default 1
			} `yaml:"static"`
		} `yaml:"image"`
		Video struct {
			DefaultResolution resolution `yaml:"defaultResolution"`
			DefaultDuration   float64    `yaml:"defaultDuration"` // seconds, default 10
			TokensPerFrame    struct {
				Mode    string `yaml:"mode"` // dynamic (default) or static
				Dynamic struct {
					Factor int `yaml:"factor"`
				} `yaml:"dynamic"`
				Static struct {
					NumTokensPerFrame int `yaml:"numTokensPerFrame"`
				} `yaml:"static"`
			} `yaml:"tokensPerFrame"`
			Frames struct {
				Mode      string `yaml:"mode"` // sampled (default) or strided
				MinFrames int    `yaml:"minFrames"`
				MaxFrames int    `yaml:"maxFrames"`
				Sampled   struct {
					SampleFPS         float64 `yaml:"sampleFPS"`
					TemporalPatchSize int     `yaml:"temporalPatchSize"`
				} `yaml:"sampled"`
				Strided struct {
					DefaultSourceFPS float64 `yaml:"defaultSourceFPS"`
					FrameStride      int     `yaml:"frameStride"`
				} `yaml:"strided"`
			} `yaml:"frames"`
			MaxVideoTokens int `yaml:"maxVideoTokens"`
		} `yaml:"video"`
	} `yaml:"estimate"`

	ModelName          string            `yaml:"modelName"`
	VLLM               config.Parameters `yaml:"vllm"`
	UDSTokenizerConfig config.Parameters `yaml:"udsTokenizerConfig"`
}

type resolution struct {
	Width  int `yaml:"width"`
	Height int `yaml:"height"`
}

// newTokenProducer accepts the estimate, and says so where the file asks for a tokenizer.
func newTokenProducer(b *Builder, raw config.Parameters) (any, error) {
	var p tokenParameters
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	for path, mode := range map[string]string{"estimate.image.mode": p.Estimate.Image.Mode, "estimate.video.tokensPerFrame.mode": p.Estimate.Video.TokensPerFrame.Mode} {
		if mode != "" && mode != "dynamic" && mode != "static" {
			return nil, raw.Errorf(path, "%q, must be dynamic or static", mode)
		}
	}
	if mode := p.Estimate.Video.Frames.Mode; mode != "" && mode != "sampled" && mode != "strided" {
		return nil, raw.Errorf("estimate.video.frames.mode", "%q, must be sampled or strided", mode)
	}
	if p.ModelName != "" || !p.VLLM.Absent() || !p.UDSTokenizerConfig.Absent() {
		b.Warn("exact tokens are not built yet: prompts are estimated, four bytes to a token")
	}
	return unparametrised{}, nil
}
