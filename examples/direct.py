"""Direct a film line by line: type what the next shot shows; an empty line ends the film.

    python examples/direct.py direct.mp4

The session goes on from line to line, so "the bear" is the bear of the shots before.
"""

import sys

import shotstream as ss
from shotstream.video import VideoWriter, display_scale


def direct(output: str = "direct.mp4", model: str = "storybook") -> None:
    session = ss.Session(ss.load(model), seed=7)
    config = session.pipeline.config
    size = (config.width, config.height)
    with VideoWriter(output, config.fps, size, display_scale(size)) as video:
        print("The first shot?", flush=True)
        for line in sys.stdin:
            if not line.strip():
                break
            shot = session.cut(line.strip(), global_caption="A story about a bear.")
            video.begin_shot(shot.caption)
            for chunk in session.stream():
                video.write(chunk.frames)
                print(f"  chunk {chunk.index + 1} of {chunk.chunks}", flush=True)
            video.end_shot()
            print("And then?", flush=True)
    print(f"{output}: {video.shots} shots, {video.frames} frames")


if __name__ == "__main__":
    direct(*sys.argv[1:])
