from .cli import main

if __name__ == '__main__':  # a loader's spawned workers import this file too
    main()
